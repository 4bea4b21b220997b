"""What is written: shards, other dtypes, other families; and what else files may hold."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from manyhands.checkpoint.model import Model, load_model, read_config, save
from manyhands.config import ModelConfig
from manyhands.config.load import load_preset
from manyhands.config.shapes import tensor_shapes
from manyhands.errors import CheckpointError, ConfigError
from manyhands.families import FAMILIES, canonical, misfit, nearest
from manyhands.files import INDEX
from manyhands.models import Decoder, init_weights

from .conftest import Made
from .other_references import ALL
from .parity import IDS, MASK
from .references import quiet, runner


def stored(directory: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in directory.glob("*.safetensors") for n, t in load_file(file).items()}


def bits(t: torch.Tensor) -> torch.Tensor:
    """Comparable, NaN and signs of zero included."""
    return t.contiguous().view(torch.uint8)


def same_state(a: Model, b: Model) -> bool:
    other = b.state_dict()
    return all(torch.equal(bits(t), bits(other[n])) for n, t in a.state_dict().items())


def old_style(values: dict[str, Any]) -> dict[str, Any]:
    """`config.json` as transformers 4 wrote it."""
    if "text_config" in values:
        return values | {"text_config": old_style(values["text_config"])}
    rope = dict(values.pop("rope_parameters", {"rope_type": "default"}))
    values["rope_theta"] = rope.pop("rope_theta", values.get("rope_theta", 10000.0))
    if "partial_rotary_factor" in rope:
        values["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    kind = rope.pop("rope_type")
    values["rope_scaling"] = None if kind == "default" else rope | {"type": kind}
    values["torch_dtype"] = values.pop("dtype", "float32")
    return values


@pytest.mark.parametrize("case", ALL)
def test_shards_dtypes_shapes_and_configs(case: str, made: Made, tmp_path: Path) -> None:
    reference = made(case)
    model = load_model(reference.directory)
    model.save(tmp_path / "shards", max_shard_size=40_000)
    assert (tmp_path / "shards" / INDEX).exists()
    assert same_state(load_model(tmp_path / "shards"), model)
    if reference.reload is not None:
        once = reference.reload(reference.unquantised or reference.directory)(IDS, MASK)[0]
        again = reference.reload(tmp_path / "shards")(IDS, MASK)[0]
        torch.testing.assert_close(again[MASK.bool()], once[MASK.bool()], atol=1e-6, rtol=0)

    other = torch.float32 if reference.unquantised else torch.bfloat16
    model.save(tmp_path / "other", dtype=other)
    origin, before = model.origin, stored(reference.unquantised or reference.directory)
    assert origin is not None
    for name, t in stored(tmp_path / "other").items():
        apart = name in origin.kept or name.endswith("e_score_correction_bias")
        assert torch.equal(bits(t), bits(before[name] if apart else before[name].to(other))), name
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    for part in (config, config.get("text_config", config)):
        assert part["dtype"] == str(other).removeprefix("torch.") and "torch_dtype" not in part
    assert load_model(tmp_path / "other").embed_tokens.weight.dtype == other

    with torch.device("meta"):
        built = Decoder(model.config)
    assert tensor_shapes(model.config) == {n: tuple(t.shape) for n, t in built.state_dict().items()}

    if case == "grok-1":  # a format nobody trains in: never chosen, only asked for
        with pytest.raises(ConfigError):
            nearest(model.config)
    else:
        assert misfit(nearest(model.config), model.config) is None

    config = json.loads((tmp_path / "shards" / "config.json").read_text())
    assert "rope_parameters" in config.get("text_config", config)
    (tmp_path / "shards" / "config.json").write_text(json.dumps(old_style(config)))
    (tmp_path / "shards" / "manifest.json").unlink()
    assert canonical(read_config(tmp_path / "shards")) == canonical(model.config)


def changed(directory: Path, target: Path, **tensors: torch.Tensor) -> Path:
    """A copy of a checkpoint with tensors changed or added."""
    target.mkdir()
    save_file(load_file(directory / "model.safetensors") | tensors, target / "model.safetensors")
    (target / "config.json").write_text((directory / "config.json").read_text())
    return target


def test_nan_and_infinity_pass_through(made: Made, tmp_path: Path) -> None:
    name, embed = "model.layers.1.block_sparse_moe.experts.3.w2.weight", "model.embed_tokens.weight"
    before = load_file(made("mixtral").directory / "model.safetensors")
    before[name][2, 3], before[name][2, 4], before[embed][5, 6] = torch.nan, -torch.inf, torch.nan
    directory = changed(made("mixtral").directory, tmp_path / "nan", **{name: before[name], embed: before[embed]})
    model = load_model(directory)
    assert model.state_dict()["layers.1.mlp.experts.down_proj"][3, 2, 3].isnan()
    model.save(tmp_path / "back")
    after = stored(tmp_path / "back")
    assert all(torch.equal(bits(t), bits(after[n])) for n, t in before.items())
    half = load_model(directory, dtype=torch.bfloat16).state_dict()["layers.1.mlp.experts.down_proj"]
    assert half[3, 2, 3].isnan() and half[3, 2, 4] == -torch.inf


def test_a_tied_head_that_is_stored_too(made: Made, tmp_path: Path) -> None:
    reference = made("llama")
    embedding = load_file(reference.directory / "model.safetensors")["model.embed_tokens.weight"]
    model = load_model(changed(reference.directory, tmp_path / "twice", **{"lm_head.weight": embedding}))
    with torch.no_grad():
        assert torch.equal(model(IDS, MASK).logits, load_model(reference.directory)(IDS, MASK).logits)
    model.save(tmp_path / "back")
    assert "lm_head.weight" not in stored(tmp_path / "back")
    for name, head in {"value": embedding + 1, "shape": embedding[1:], "dtype": embedding.half()}.items():
        directory = changed(reference.directory, tmp_path / name, **{"lm_head.weight": head.contiguous()})
        with pytest.raises(CheckpointError, match=r"'lm_head.weight' differs .* tie_word_embeddings"):
            load_model(directory)


@pytest.fixture(scope="module")
def quickstart() -> Decoder:
    """The quickstart preset's model with random weights, its biases too."""
    model = Decoder(load_preset("quickstart").model)
    init_weights(model, seed=1)
    with torch.no_grad():
        for name, t in model.state_dict().items():
            if name.endswith("e_score_correction_bias"):
                t.uniform_(-0.2, 0.2, generator=torch.Generator().manual_seed(2))
    return model.eval()


def test_the_quickstart_is_a_dots1(quickstart: Decoder, tmp_path: Path) -> None:
    from transformers import Dots1ForCausalLM

    quiet()
    assert nearest(quickstart.config) is FAMILIES["dots1"]
    save(quickstart, tmp_path / "theirs")
    theirs, info = Dots1ForCausalLM.from_pretrained(
        tmp_path / "theirs", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values()), info
    logits, chosen = runner(theirs.eval())(IDS, MASK)
    with torch.no_grad():
        out = quickstart(IDS, MASK)
    real = MASK.bool()
    torch.testing.assert_close(out.logits[real], logits[real], atol=1e-4, rtol=0)
    for layer, routing in out.routings.items():
        ours, ids = (t[real.flatten()].sort(-1).values for t in (routing.expert_ids, chosen[layer]))
        assert torch.equal(ours, ids)
    back = load_model(tmp_path / "theirs")
    assert canonical(back.config) == canonical(quickstart.config)
    assert all(torch.equal(t, back.state_dict()[n]) for n, t in quickstart.state_dict().items())


@pytest.mark.parametrize(
    ("case", "family", "field"),
    [
        ("mixtral", "olmoe", "qk_norm"),
        ("olmoe", "mixtral", "qk_norm"),
        ("qwen2_moe", "qwen3_moe", "shared"),
        ("deepseek_v3", "deepseek_v2", "score"),
        ("dots1", "glm4_moe", "sliding_window"),
        ("gpt_oss", "mixtral", "sinks"),
        ("llama", "mixtral", "dense"),
        ("mixtral", "llama", "mixture of experts"),
        ("grok-1", "mixtral", "embedding_multiplier"),
    ],
)
def test_a_family_that_does_not_fit(case: str, family: str, field: str, made: Made, tmp_path: Path) -> None:
    model = load_model(made(case).directory)
    with pytest.raises(ConfigError, match=field):
        model.save(tmp_path / "new", family=family)
    assert not (tmp_path / "new").exists()


def test_a_model_that_fits_another_family(made: Made, tmp_path: Path) -> None:
    model = load_model(made("mixtral").directory)
    assert isinstance(model.config, ModelConfig)
    model.save(tmp_path / "ours", family="manyhands")
    ours = load_model(tmp_path / "ours")
    assert same_state(ours, model) and canonical(ours.config) == canonical(model.config)
    ours.save(tmp_path / "back", family="mixtral")
    before, after = stored(made("mixtral").directory), stored(tmp_path / "back")
    assert before.keys() == after.keys() and all(torch.equal(t, after[n]) for n, t in before.items())
