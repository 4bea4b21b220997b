"""Adapters as PEFT's files, with PEFT itself as the oracle: what we write it loads, what it wrote we load."""

import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from manyhands.checkpoint.adapters import load_adapter, read_adapter, save_adapter
from manyhands.checkpoint.model import Model, load_model
from manyhands.config.adapter import LoraConfig
from manyhands.errors import CheckpointError, ConfigError, UserError
from manyhands.families import FAMILIES
from manyhands.models.adapted import adapt, adapter_state, is_adapted, low_ranks, merge

from ..families.references import CASES, V, make  # type: ignore[import-not-found,unused-ignore]
from .test_hostile_fuzz import edited  # type: ignore[import-not-found,unused-ignore]

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")

IDS = torch.randint(0, V, (2, 11), generator=torch.Generator().manual_seed(0))
ALL = ("attention", "dense", "shared", "routed")
FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Callable[[str], Path]:
    """A family's small random model, in files, once."""
    made: dict[str, Path] = {}

    def find(case: str) -> Path:
        if case not in made:
            made[case] = make(case, tmp_path_factory.mktemp("base")).directory
        return made[case]

    return find


def theirs(directory: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoModelForCausalLM.from_pretrained(directory).eval()


def with_peft(directory: Path, adapter: Path) -> Any:
    """PEFT's model, which found every tensor it looked for and no other. (It warns of its own patterns, too.)"""
    model = theirs(directory)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = peft.PeftModel.from_pretrained(model, adapter).eval()
    assert not [w for w in said if "adapter keys" in str(w.message) or "unexpected" in str(w.message).lower()]
    return found


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS).logits


def stirred(directory: Path, targets: tuple[str, ...] = ALL, r: int = 3, **fields: Any) -> Model:
    model = load_model(directory)
    adapt(model, LoraConfig(r=r, alpha=6.0, targets=targets, **fields), seed=4)
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for low in low_ranks(model).values():
            low.lora_B.normal_(0.0, 0.3, generator=g)
    return model.eval()


def off(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max()) / float(b.std())


PEFT_READS = ("qwen3_moe", "olmoe", "mixtral", "deepseek_v3")


@pytest.mark.parametrize("form", ["per-expert", "fused"])
@pytest.mark.parametrize("family", PEFT_READS)
def test_peft_loads_ours(family, form, base, tmp_path) -> None:
    directory = base(family)
    model = stirred(directory)
    expected = logits(model)
    save_adapter(model, tmp_path / "adapter", form=form)
    plain = logits(load_model(directory))
    assert off(plain, expected) > 0.3, "the adapter matters"
    found = logits(with_peft(directory, tmp_path / "adapter"))
    assert off(found, expected) < 1e-5
    again = load_model(directory)
    load_adapter(again, tmp_path / "adapter")
    assert off(logits(again), expected) < 1e-6
    merge(model)
    model.save(tmp_path / "merged")
    assert off(logits(theirs(tmp_path / "merged")), expected) < 1e-5


def test_peft_loads_ours_of_gpt_oss(base, tmp_path) -> None:
    """Gate and up in turn, [E, in, out] in memory; its files have no expert alone."""
    directory = base("gpt_oss")
    model = stirred(directory, ("attention", "routed"))
    save_adapter(model, tmp_path / "adapter")
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert fields["target_parameters"], "fused, as there is no other form"
    expected = logits(model)
    assert off(logits(with_peft(directory, tmp_path / "adapter")), expected) < 1e-5
    again = load_model(directory)
    load_adapter(again, tmp_path / "adapter")
    assert off(logits(again), expected) < 1e-6
    with pytest.raises(ConfigError, match="files of gpt_oss have no expert alone; use 'fused'"):
        save_adapter(model, tmp_path / "other", form="per-expert")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("targets", [("experts.down_proj",), ("gate_up_proj",), ("q_proj", "o_proj")])
@pytest.mark.parametrize("form", ["per-expert", "fused"])
def test_some_matrices(targets, form, base, tmp_path) -> None:
    directory = base("mixtral")
    model = stirred(directory, targets, use_rslora=True)
    expected = logits(model)
    save_adapter(model, tmp_path / "adapter", form=form)
    assert off(logits(with_peft(directory, tmp_path / "adapter")), expected) < 1e-5
    again = load_model(directory)
    load_adapter(again, tmp_path / "adapter")
    assert off(logits(again), expected) < 1e-6
    assert set(low_ranks(again)) == set(low_ranks(model))


def test_some_layers(base, tmp_path) -> None:
    """A module that is named whole where not all of its kind are adapted."""
    directory = base("qwen3_moe")
    model = stirred(directory, ("layers.1.self_attn.q_proj", "layers.2.self_attn.v_proj", "o_proj"))
    save_adapter(model, tmp_path / "adapter")
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert set(fields["target_modules"]) == {
        "model.layers.1.self_attn.q_proj",
        "model.layers.2.self_attn.v_proj",
        "o_proj",
    }
    assert off(logits(with_peft(directory, tmp_path / "adapter")), logits(model)) < 1e-5


def trained_by_peft(directory: Path, adapter: Path, seed: int = 1, **fields: Any) -> Tensor:
    """An adapter that PEFT makes and saves, and what PEFT computes with it."""
    config = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **fields)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(theirs(directory), config).eval()
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(adapter)
    return logits(model)


THEIRS: dict[str, dict[str, Any]] = {
    "experts and attention": {"target_modules": ["q_proj", "o_proj"], "target_parameters": FUSED},
    "down alone": {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"], "use_rslora": True},
    "gate and up alone": {"target_modules": ["v_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
    "patterns": {
        "target_modules": ["q_proj"],
        "target_parameters": FUSED,
        "rank_pattern": {"q_proj": 3},
        "alpha_pattern": {"q_proj": 5, "experts.down_proj": 4},
    },
}


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        *((family, "experts and attention") for family in ("qwen3_moe", "mixtral")),
        *(("olmoe", fields) for fields in THEIRS),
        *(("gpt_oss", fields) for fields in THEIRS if fields != "patterns"),
    ],
)
def test_we_load_pefts(family, fields, base, tmp_path) -> None:
    directory = base(family)
    expected = trained_by_peft(directory, tmp_path / "adapter", **THEIRS[fields])
    model = load_model(directory)
    load_adapter(model, tmp_path / "adapter")
    assert off(logits(model), expected) < 1e-5
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".lora_" not in name)


def test_what_peft_makes_of_experts_one_by_one(base, tmp_path) -> None:
    """It doubles the rank of gate and up, writes B in blocks, and says so by patterns."""
    directory = base("qwen3_moe")
    model = stirred(directory)
    save_adapter(model, tmp_path / "ours", form="per-expert")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with_peft(directory, tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    again = load_model(directory)
    load_adapter(again, tmp_path / "theirs")
    assert off(logits(again), logits(model)) < 1e-5
    assert low_ranks(again)["layers.1.mlp.experts.gate_up_proj"].rank == 6


def test_gate_and_up_with_ranks_of_their_own(base, tmp_path) -> None:
    """As others write experts one by one: A of gate and of up differ, and become one of both ranks."""
    directory = base("olmoe")
    model = stirred(directory, ("routed",))
    save_adapter(model, tmp_path / "adapter", form="per-expert")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    g = torch.Generator().manual_seed(8)
    for name, tensor in tensors.items():
        if "lora_A" in name:
            tensor.normal_(0.0, 0.2, generator=g)
    save_file(tensors, file, metadata={"format": "pt"})
    expected = logits(with_peft(directory, tmp_path / "adapter"))
    again = load_model(directory)
    load_adapter(again, tmp_path / "adapter")
    ranks = {name.rpartition(".")[2]: low.rank for name, low in low_ranks(again).items()}
    assert ranks == {"gate_up_proj": 6, "down_proj": 3}
    assert off(logits(again), expected) < 1e-5


def old_layout(tensors: dict[str, Tensor], E: int) -> dict[str, Tensor]:
    """A fused adapter as PEFT up to 0.19.0 wrote it: entry by entry, in and out changed over.

    There the delta of an expert was Σ_r B[i, (r, e)] · A[(e, r), o] at row o and column i.
    """
    found = {}
    for name in [name for name in tensors if "lora_A" in name]:
        A, B = tensors[name], tensors[name.replace("lora_A", "lora_B")]
        r, out, inputs = A.shape[0] // E, B.shape[0], A.shape[1]
        a, b = torch.zeros(E * r, out), torch.zeros(inputs, r * E)
        for e in range(E):
            for i in range(r):
                a[e * r + i] = B[:, i * E + e]
                b[:, i * E + e] = A[e * r + i]
        found[name], found[name.replace("lora_A", "lora_B")] = a, b
    return found


@pytest.mark.parametrize("version", ["0.18.1", "0.19.0", None])
def test_the_layout_of_older_pefts(version, base, tmp_path) -> None:
    """By shape where it shows. Of OLMoE's gate and up (here D = 2F = 32) it does not: another tensor says it."""
    directory = base("olmoe")
    model = stirred(directory, ("routed",))
    save_adapter(model, tmp_path / "adapter", form="fused")
    file, config = (tmp_path / "adapter" / name for name in ("adapter_model.safetensors", "adapter_config.json"))
    save_file(old_layout(load_file(file), 8), file)
    fields = json.loads(config.read_text())
    config.write_text(json.dumps({**fields, "peft_version": version}))
    again = load_model(directory)
    load_adapter(again, tmp_path / "adapter")
    assert off(logits(again), logits(model)) < 1e-6


@pytest.mark.parametrize(
    ("version", "old"), [("0.19.0", True), ("0.19.1.dev0", False), ("0.21.2", False), (None, None)]
)
def test_what_only_the_version_says(version, old, base, tmp_path) -> None:
    """Gate and up alone, D = 2F."""
    directory = base("olmoe")
    model = stirred(directory, ("gate_up_proj",))
    save_adapter(model, tmp_path / "adapter", form="fused")
    file, config = (tmp_path / "adapter" / name for name in ("adapter_model.safetensors", "adapter_config.json"))
    if old:
        save_file(old_layout(load_file(file), 8), file)
    fields = json.loads(config.read_text())
    config.write_text(json.dumps({**fields, "peft_version": version}))
    again = load_model(directory)
    if old is None:
        with pytest.raises(CheckpointError, match=r"peft_version in adapter_config\.json would say which"):
            load_adapter(again, tmp_path / "adapter")
        return
    load_adapter(again, tmp_path / "adapter")
    assert off(logits(again), logits(model)) < 1e-6


@pytest.mark.parametrize(("version", "old"), [("0.18.1", False), ("0.19.0", True), ("0.20.0", False)])
def test_the_layout_of_older_pefts_of_gpt_oss(version, old, base, tmp_path) -> None:
    """Parameters [E, in, out]: only 0.19.0 changed in and out over. Gate and up alone, D = 2F."""
    directory = base("gpt_oss")
    model = stirred(directory, ("gate_up_proj",))
    save_adapter(model, tmp_path / "adapter")
    file, config = (tmp_path / "adapter" / name for name in ("adapter_model.safetensors", "adapter_config.json"))
    if old:
        save_file(old_layout(load_file(file), 8), file)
    config.write_text(json.dumps({**json.loads(config.read_text()), "peft_version": version}))
    again = load_model(directory)
    load_adapter(again, tmp_path / "adapter")
    assert off(logits(again), logits(model)) < 1e-6


def test_our_own_models(tmp_path) -> None:
    """A model of one's own is named as the family it would be written as."""
    from ..models.tiny_models import tiny  # type: ignore[import-not-found,unused-ignore]

    model = tiny("norm_head", router={"num_experts_per_tok": 2}).eval()
    adapt(model, LoraConfig(r=2, targets=("attention", "dense", "routed")))
    with torch.no_grad():
        for low in low_ranks(model).values():
            low.lora_B.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(1))
    save_adapter(model, tmp_path / "adapter")
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert "base_model.model.model.layers.1.mlp.experts.0.gate_proj.lora_A.weight" in names
    found = read_adapter(tmp_path / "adapter", model.config, FAMILIES["manyhands"])
    state = adapter_state(model)
    for part, pair in found.matrices.items():
        assert torch.equal(pair.A, state[f"{part}.lora_A"]) and torch.equal(pair.B, state[f"{part}.lora_B"])
    assert {f"{part}.lora_A" for part in found.matrices} == {name for name in state if name.endswith("A")}


def _config(values: dict[str, Any]) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def _tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def changed(directory: Path) -> None:
        path = directory / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return changed


Q, E0 = "base_model.model.model.layers.0.self_attn.q_proj", "base_model.model.model.layers.0.mlp.experts.0"
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "another method": (_config({"peft_type": "IA3"}), r'peft_type = "IA3": expected "LORA"'),
    "DoRA": (_config({"use_dora": True}), r"'use_dora' = true changes what an adapter computes"),
    "biases": (_config({"bias": "lora_only"}), r"'bias' = \"lora_only\" changes"),
    "whole modules": (_config({"modules_to_save": ["lm_head"]}), r"'modules_to_save' = \[\"lm_head\"\] changes"),
    "a field of the future": (_config({"use_better_lora": 3}), r"'use_better_lora' = 3 changes"),
    "another base": (_config({"init_lora_weights": "pissa_niter_4"}), "leaves the base model as it is"),
    "no rank": (_config({"r": 0}), "r = 0: expected an integer from 1"),
    "a rank of another file": (_config({"r": 4}), "has rank 4; its tensors have 3"),
    "no number": (_config({"lora_alpha": "8"}), 'lora_alpha = "8": expected a number'),
    "an endless pattern": (_config({"alpha_pattern": {"(a+)+$": 3}}), r"alpha_pattern: '\(a\+\)\+\$' = 3 is not"),
    "a router": (
        _tensors(
            lambda t: t.update(
                {f"{E0[:-10]}.gate.lora_{side}.weight": torch.ones(3, 3) for side in "AB"}  # ….mlp.gate
            )
        ),
        r"adapts 'model\.layers\.0\.mlp\.gate', which this model does not have, or which takes no adapter",
    ),
    "a layer that is not there": (
        _tensors(
            lambda t: t.update({f"{Q.replace('.0.', '.7.')}.lora_{side}.weight": torch.ones(3, 3) for side in "AB"})
        ),
        r"adapts 'model\.layers\.7\.self_attn\.q_proj'",
    ),
    "an embedding": (
        _tensors(lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(3, 3)})),
        "embed_tokens.lora_embedding_A' is not LoRA's A or B",
    ),
    "one expert missing": (
        _tensors(lambda t: [t.pop(f"{E0}.up_proj.lora_{side}.weight") for side in "AB"]),
        r"experts\.0\.up_proj\.lora_A\.weight is missing; other experts have it",
    ),
    "B missing": (_tensors(lambda t: t.pop(f"{Q}.lora_B.weight")), "q_proj has A alone"),
    "another width": (
        _tensors(lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(3, 33)})),
        r"q_proj: A \[3, 33\] and B \[\d+, 3\]; expected \[r, 32\]",
    ),
    "ranks that differ between experts": (
        _tensors(
            lambda t: t.update(
                {f"{E0}.down_proj.lora_A.weight": torch.ones(5, 16), f"{E0}.down_proj.lora_B.weight": torch.ones(32, 5)}
            )
        ),
        r"experts\.1\.down_proj: A \[3, 16\].*expected \[5, 16\]|has rank 3; its tensors have 5",
    ),
    "integers": (
        _tensors(lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(3, 32, dtype=torch.int32)})),
        r"is I32 \[3, 32\]; expected a matrix of floats",
    ),
    "nothing": (_tensors(lambda t: t.clear()), "holds no tensor"),
    "no config": (lambda d: (d / "adapter_config.json").unlink(), r"adapter_config\.json: does not exist"),
    "no tensors": (lambda d: (d / "adapter_model.safetensors").unlink(), r"adapter_model\.safetensors: does not exist"),
    "a pickle": (
        lambda d: (d / "adapter_model.safetensors").write_bytes(b"PK\x03\x04" + bytes(64)),
        "a pickle, which can run any code",
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_refused(why, base, tmp_path) -> None:
    change, message = REFUSED[why]
    model = stirred(base("olmoe"), ("attention", "routed"))
    save_adapter(model, tmp_path / "adapter", form="per-expert")
    change(tmp_path / "adapter")
    other = load_model(base("olmoe"))
    with pytest.raises(CheckpointError, match=message):
        load_adapter(other, tmp_path / "adapter")
    assert not is_adapted(other)


def test_what_exists_stays(base, tmp_path) -> None:
    model = stirred(base("olmoe"), ("q_proj",))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is not empty"):
        save_adapter(model, tmp_path / "mine", overwrite=False)
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(UserError, match="--overwrite"):
        save_adapter(model, tmp_path / "adapter")
    save_adapter(model, tmp_path / "adapter", overwrite=True)
    with pytest.raises(ConfigError, match="allowed are per-expert, fused"):
        save_adapter(model, tmp_path / "third", form="stacked")
    with pytest.raises(ConfigError, match="the model has no adapter"):
        save_adapter(load_model(base("olmoe")), tmp_path / "third")
    with pytest.raises(ConfigError, match="merge"):
        load_adapter(model, tmp_path / "adapter")


def test_every_case_of_the_oracles_is_there() -> None:
    assert {*PEFT_READS, "gpt_oss"} <= set(CASES)


def spoilt(data: bytes, rng: random.Random) -> bytes:
    """Bytes changed, cut or added; or what the header of a safetensors file says."""
    kind = rng.random()
    if kind < 0.4:
        size = int.from_bytes(data[:8], "little")
        header = edited(data[8 : 8 + size], rng)
        return len(header).to_bytes(8, "little") + header + data[8 + size :]
    if kind < 0.6:
        return data[: rng.randrange(len(data))]
    if kind < 0.7:
        return data + rng.randbytes(8)
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(min(len(data), 4096))] = rng.randrange(256)
    return bytes(changed)


def test_spoilt_at_random(base, tmp_path) -> None:
    """An adapter, or one line. Never another error, and never long."""
    directory = base("olmoe")
    save_adapter(stirred(directory, ("o_proj", "routed")), tmp_path / "adapter", form="fused")
    model, rng = load_model(directory), random.Random(0)
    file, config = (tmp_path / "adapter" / name for name in ("adapter_model.safetensors", "adapter_config.json"))
    tensors, fields = file.read_bytes(), config.read_text()
    read = 0
    for _ in range(120):
        if rng.random() < 0.5:
            config.write_bytes(edited(fields.encode(), rng))
        else:
            file.write_bytes(spoilt(tensors, rng))
        try:
            read_adapter(tmp_path / "adapter", model.config, FAMILIES["olmoe"])
            read += 1
        except CheckpointError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000
        file.write_bytes(tensors)
        config.write_text(fields)
    assert 10 < read < 110, read
