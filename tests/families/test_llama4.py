"""Llama 4 beyond the rows of parity: queries by position, decoding across chunks, packing, what is refused."""

from pathlib import Path

import pytest
import torch

from manyhands.checkpoint.find import open_checkpoint
from manyhands.checkpoint.model import load_model, save
from manyhands.config import AttentionConfig, ModelConfig, MoEConfig, PackedConfig, SamplingConfig
from manyhands.engine.engine import Engine
from manyhands.errors import ConfigError
from manyhands.models import Decoder
from manyhands.moe import MoELayer
from manyhands.quantize.quantize import quantize

from .conftest import Made
from .parity import IDS, S
from .references import Reference, make

FLOOR = 5


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Whose queries are multiplied from the fifth position on, in its layer without rotation; with biases.

    Not in the rows of parity: a bias of the keys has no gradient but rounding where nothing turns."""
    directory = tmp_path_factory.mktemp("llama4") / "model"
    return make("llama4_text", directory, floor_scale=FLOOR, attn_scale=0.7, attention_bias=True)


def test_queries_by_position_as_in_transformers(tuned: Reference) -> None:
    """Without padding, which transformers numbers too; on a cache as well, across three borders of chunks."""
    model, whole = load_model(tuned.directory, dtype=torch.float32), torch.ones_like(IDS)
    assert model.config.attention.floor_scale == FLOOR and model.config.attention.nope_layers == (1,)
    assert tuned.decode is not None
    with torch.no_grad():
        ours = model(IDS).logits
        assert (ours - tuned.run(IDS, whole)[0]).abs().max() < 1e-4
        assert (ours - tuned.decode(IDS, whole, 6)).abs().max() < 1e-4
        plain = ModelConfig.model_validate(
            model.config.model_dump() | {"attention": model.config.attention.model_dump() | {"floor_scale": None}}
        )
        other = Decoder(plain)
        other.load_state_dict(model.state_dict())
        assert (ours - other.eval()(IDS).logits).abs().max() > 1e-2, "the factor matters"


def test_generation_is_the_whole_sequence_again(tuned: Reference) -> None:
    """Two prompts of different lengths at once, past borders of chunks: each token is the likeliest of a fresh pass."""
    model = load_model(tuned.directory, dtype=torch.float32)
    assert isinstance(model, Decoder)
    prompts = [IDS[0, :5].tolist(), IDS[1, :9].tolist()]
    made = Engine(model).generate(prompts, SamplingConfig(max_new_tokens=12, temperature=0.0))
    for prompt, answer in zip(prompts, made, strict=True):
        ids = prompt + list(answer.token_ids)
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        assert (
            logits[len(prompt) - 1 : -1].argmax(-1).tolist() == list(answer.token_ids) and len(answer.token_ids) == 12
        )


def test_it_is_packed_and_kept(made: Made, tmp_path: Path) -> None:
    """Records in 8 bits say nearly the same; and our own format holds every field."""
    directory = made("llama4_text").directory
    quantize(open_checkpoint(directory), tmp_path / "q8", PackedConfig(experts={"format": "int8"}, linear=None), None)
    exact, packed = load_model(directory, dtype=torch.float32), load_model(tmp_path / "q8", dtype=torch.float32)
    assert packed.config == exact.config
    with torch.no_grad():
        right, found = exact(IDS).logits, packed(IDS).logits
    assert (right - found).norm() < 0.05 * right.norm()
    save(exact, tmp_path / "again", family="manyhands")
    assert load_model(tmp_path / "again").config == exact.config


def test_what_its_one_expert_reads_is_weighed() -> None:
    """By hand, and with gradients: y = E(w·x), where w·E(x) is another function."""
    torch.manual_seed(0)
    moe = MoEConfig(
        router={"num_experts": 3, "num_experts_per_tok": 1, "score": "sigmoid", "norm_topk_prob": False},
        moe_intermediate_size=8,
        weigh="input",
    )
    layer, x = MoELayer(moe, 6), torch.randn(4, 6, requires_grad=True)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_()
    y, routing = layer(x, keep_outputs=True)
    assert routing.expert_outputs is not None
    right = torch.zeros_like(y)
    for t in range(4):
        e, w = int(routing.expert_ids[t, 0]), (x[t] @ layer.router.weight.T).sigmoid().max()
        gate, up = (layer.experts.gate_up_proj[e] @ (w * x[t])).chunk(2)  # type: ignore[operator,index,union-attr]
        right[t] = layer.experts.down_proj[e] @ (torch.nn.functional.silu(gate) * up)  # type: ignore[operator,index]
    torch.testing.assert_close(y, right)
    torch.testing.assert_close((routing.weights[..., None] * routing.expert_outputs).sum(1), y)
    torch.testing.assert_close(layer(x)[0], y)
    ours, theirs = (torch.autograd.grad(out.square().sum(), x, retain_graph=True)[0] for out in (y, right))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (MoEConfig, {"weigh": "input"}, "weigh = 'input' is for one expert per token: router.num_experts_per_tok = 1"),
        (AttentionConfig, {"layer_types": ["chunked_attention"]}, "which needs attention_chunk_size"),
        (AttentionConfig, {"sliding_window": 4, "attention_chunk_size": 4}, "not both"),
        (AttentionConfig, {"floor_scale": 4}, "floor_scale is for the layers that nope_layers names"),
        (AttentionConfig, {"kind": "mla", "nope_layers": [0]}, "nope_layers has no meaning with kind = 'mla'"),
        (ModelConfig, {"attention": {"nope_layers": [9]}}, r"nope_layers names layer 9 of 4 \(from 0\)"),
    ],
)
def test_what_makes_no_sense_is_refused(config: type, fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**fields)


def test_a_chunk_as_long_as_the_sequence_is_no_chunk() -> None:
    """Longer ones change nothing; shorter ones do."""
    torch.manual_seed(0)
    base = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 16}
    heads = {"num_attention_heads": 2, "head_dim": 16}
    models = [Decoder(ModelConfig(**base, attention=heads | {"attention_chunk_size": n})) for n in (None, S, S - 1)]
    with torch.no_grad():
        for p in models[0].parameters():
            p.normal_(0.0, 0.3)
        for model in models[1:]:
            model.load_state_dict(models[0].state_dict())
        whole, same, cut = (model.eval()(IDS).logits for model in models)
    assert torch.equal(whole, same)
    torch.testing.assert_close(whole[:, : S - 1], cut[:, : S - 1])
    assert (whole[:, -1] - cut[:, -1]).abs().max() > 1e-3
