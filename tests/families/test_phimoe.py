"""Phi-3.5-MoE beyond the rows of parity: sequences past the original length, counts, training, what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from manyhands.catalog import load
from manyhands.checkpoint.model import load_model
from manyhands.cli.main import app
from manyhands.config import ModelConfig, MoEConfig, SamplingConfig
from manyhands.engine.engine import Engine
from manyhands.errors import ConfigError, UserError
from manyhands.families import read_config
from manyhands.models import Decoder
from manyhands.moe import MoELayer
from manyhands.plan.count import count_model
from manyhands.plan.count_shape import count_shape

from .conftest import Made
from .parity import IDS, MASK
from .published import PUBLISHED
from .references import make

LONG_FACTOR = [1.5, 2.0, 3.5, 6.0]


@pytest.fixture(scope="module")
def past(tmp_path_factory: pytest.TempPathFactory):
    """A reference whose original length is 16: of the two rows, of 24 and 15 real tokens, one is longer."""
    from .references import LONGROPE

    directory = tmp_path_factory.mktemp("phi") / "model"
    rope = LONGROPE | {"original_max_position_embeddings": 16}
    return make("phimoe", directory, rope_parameters=rope)


def _turn_by_the_long_factors(reference, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the publisher's code does past the original length, and transformers 5.23 does not."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.phimoe.modeling_phimoe import PhimoeRotaryEmbedding

    class Long(PhimoeRotaryEmbedding):
        def __init__(self, *arguments, **named) -> None:
            super().__init__(*arguments, **named)
            self.rope_init_fn = lambda config: ROPE_INIT_FUNCTIONS["longrope"](config, seq_len=17)

    monkeypatch.setattr("transformers.models.phimoe.modeling_phimoe.PhimoeRotaryEmbedding", Long)


def test_a_long_sequence_is_turned_by_the_long_factors(past, monkeypatch: pytest.MonkeyPatch) -> None:
    model, whole = load_model(past.directory, dtype=torch.float32), torch.ones_like(MASK)
    with torch.no_grad():
        ours, short = model(IDS).logits, model(IDS[:, :16]).logits
    by_short, _ = past.run(IDS, whole)
    _turn_by_the_long_factors(past, monkeypatch)
    by_long, _ = past.reload(past.directory)(IDS, whole)
    assert float((ours - by_long).abs().max()) < 1e-5
    assert float((ours - by_short).abs().max()) > 1e-2
    assert float((ours[:, :16] - short).abs().max()) > 1e-2, "no later token changes an earlier one but by the length"


def test_each_row_goes_by_its_own_length(past) -> None:
    model = load_model(past.directory, dtype=torch.float32)
    with torch.no_grad():
        both = model(IDS, MASK).logits
        alone = model(IDS[:1]).logits[0], model(IDS[1:, 9:]).logits[0]
    torch.testing.assert_close(both[0], alone[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(both[1, 9:], alone[1], atol=1e-5, rtol=1e-5)


def test_a_sequence_that_becomes_long_is_not_continued(past) -> None:
    model = load_model(past.directory, dtype=torch.float32)
    cache = model.new_cache()
    with torch.no_grad():
        model(IDS[:, :16], None, cache)
        with pytest.raises(ConfigError, match=r"at most 16 tokens.* run all of it at once, with a new cache"):
            model(IDS[:, 16:17], None, cache)
        cache = model.new_cache()  # one that is long from its first tokens on
        steps = [model(IDS[:, part], None, cache).logits for part in (slice(0, 17), slice(17, 20), slice(20, 24))]
        torch.testing.assert_close(torch.cat(steps, 1), model(IDS).logits, atol=1e-5, rtol=1e-5)


def test_generation_ends_at_the_original_length(past) -> None:
    model = load_model(past.directory, dtype=torch.float32)
    engine = Engine(model)
    assert len(engine.generate([[1, 2, 3]], SamplingConfig(max_new_tokens=40))[0].token_ids) == 13
    with pytest.raises(UserError, match=r"rope\.original_max_position_embeddings \(LongRoPE\) = 16 it may have at"):
        engine.generate([list(range(16))], SamplingConfig(max_new_tokens=1))


def test_what_the_runtime_does_not_compute_is_called(past) -> None:
    from manyhands.runtime.prepare import prepare

    said = {part.name: part.why for part in prepare(load_model(past.directory, dtype=torch.float32)).parts}
    assert "LayerNorm has no claim" in said["input_layernorm"] and "LayerNorm" in said["norm"]
    assert said["self_attn"] is not None and said["mlp"] is not None  # LongRoPE; SparseMixer


def test_counts_are_those_of_the_catalogue_and_of_the_built_model() -> None:
    config = read_config(PUBLISHED["phimoe"][1], "config.json")[1]
    shape = load("phi-3.5-moe").shape
    assert isinstance(config, ModelConfig) and shape is not None
    with torch.device("meta"):
        built = sum(p.numel() for p in Decoder(config).parameters())
    counts, published = count_model(config), count_shape(shape)
    assert counts.total == built == published.total == 41_873_153_344
    assert counts.active == published.active


def test_the_input_is_shaken_in_training_only() -> None:
    layer = MoELayer(MoEConfig(input_jitter=0.1, moe_intermediate_size=8), 16).eval()
    x, seen = torch.randn(64, 16), []
    layer.router.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    layer.experts.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    layer(x), layer.train()(x)
    assert all(torch.equal(given, x) for given in seen[:2])
    assert torch.equal(seen[2], seen[3]), "router and experts see the same"
    ratio = seen[2] / x
    assert 0.9 <= float(ratio.min()) < 0.92 and 1.08 < float(ratio.max()) <= 1.1


def test_the_command_line(past, made: Made, tmp_path: Path) -> None:
    run = CliRunner().invoke
    plan = json.loads(run(app, ["plan", str(past.directory), "--json"]).stdout)["models"][0]
    assert plan["origin"].endswith("config.json (Phi-3.5-MoE)")
    assert plan["counts"]["total"] == sum(p.numel() for p in load_model(past.directory).parameters())
    assert run(app, ["convert", str(past.directory), str(tmp_path / "ours"), "--to", "manyhands"]).exit_code == 0
    assert run(app, ["convert", str(tmp_path / "ours"), str(tmp_path / "back"), "--to", "phimoe"]).exit_code == 0
    receipt = json.loads((tmp_path / "back" / "receipt.json").read_text())
    assert len(receipt["target_tensors"]) == len(load_file(past.directory / "model.safetensors"))
    with torch.no_grad():
        logits = [load_model(d, dtype=torch.float32)(IDS).logits for d in (past.directory, tmp_path / "back")]
    assert torch.equal(*logits)
    assert past.reload(tmp_path / "back") is not None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rope": {"short_factor": [1.0] * 63}}, r"rope\.short_factor has 63 entries; .* 128 needs 64"),
        ({"rope": {"long_factor": [1.0] * 63 + ["x"]}}, "long_factor = 'x'"),
        ({"rope": {"long_factor": 3.0}}, "long_factor = 3.0: expected a list of numbers"),
        ({"rope": {"short_mscale": None}}, "'short_mscale' is missing"),
        ({"rope": {"boost": 1.0}}, "unknown field 'boost'"),
        ({"rope": {"type": "linear"}}, "supported: 'default', 'longrope'"),
        ({"tie_word_embeddings": True}, "lm_head_bias needs a head of its own"),
    ],
)
def test_what_is_refused(changes: dict, said: str) -> None:
    values = json.loads(json.dumps(PUBLISHED["phimoe"][1]))
    values["rope_scaling"] |= changes.pop("rope", {})
    with pytest.raises(ConfigError, match=said):
        read_config(values | changes, "config.json")
