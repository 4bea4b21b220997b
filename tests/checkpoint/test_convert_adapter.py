"""`convert --adapter`: an adapter merged into its model, with a receipt that refuses what did not happen; and the
adapter alone, in either of PEFT's forms."""

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from manyhands.checkpoint import convert as converting
from manyhands.checkpoint import merge as merging
from manyhands.checkpoint.adapters import load_adapter, save_adapter
from manyhands.checkpoint.adapters.export import export_adapter
from manyhands.checkpoint.convert import convert
from manyhands.checkpoint.gguf.export import export
from manyhands.checkpoint.model import load_model
from manyhands.checkpoint.source import open_source
from manyhands.config import PackedConfig, Packing
from manyhands.config.adapter import LoraConfig
from manyhands.errors import CheckFailed, CheckpointError, UserError
from manyhands.models.adapted import adapt, low_ranks
from manyhands.quantize.quantize import quantize
from manyhands.quantize.receipt import Sample

from ..families.references import V, make  # type: ignore[import-not-found,unused-ignore]
from ..small_runs import manyhands  # type: ignore[import-not-found,unused-ignore]

IDS = torch.randint(0, V, (2, 11), generator=torch.Generator().manual_seed(0))
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Callable[..., Path]:
    """A family's small random model in files, once for each dtype."""
    made: dict[tuple[str, str], Path] = {}

    def find(family: str, dtype: str = "float32") -> Path:
        if (family, dtype) not in made:
            directory = make(family, tmp_path_factory.mktemp("base")).directory
            if dtype != "float32":
                other = tmp_path_factory.mktemp("base") / "model"
                load_model(directory).save(other, dtype=getattr(torch, dtype))
                directory = other
            made[family, dtype] = directory
        return made[family, dtype]

    return find


def adapter_of(
    directory: Path, path: Path, std: float = 0.3, targets=("attention", "dense", "shared", "routed")
) -> Path:
    """An adapter whose expert 3 of each layer adds nothing, as one that no token chose."""
    model = load_model(directory, dtype=torch.float32)
    adapt(model, LoraConfig(r=3, alpha=6.0, targets=targets), seed=4)
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for low in low_ranks(model).values():
            low.lora_B.normal_(0.0, std, generator=g)
            if low.lora_B.dim() == 3:
                low.lora_B[3] = 0.0
    save_adapter(model, path)
    return path


@torch.no_grad()
def adapted_logits(directory: Path, adapter: Path) -> Tensor:
    model = load_model(directory, dtype=torch.float32, decode=True)
    load_adapter(model, adapter)
    return model(IDS).logits


@torch.no_grad()
def their_logits(directory: Path) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        return transformers.AutoModelForCausalLM.from_pretrained(directory).eval().float()(IDS).logits


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3"])
def test_merged_is_adapted(family, base, tmp_path) -> None:
    directory = base(family)
    targets = ("attention", "routed") if family == "gpt_oss" else ("attention", "dense", "shared", "routed")
    adapter = adapter_of(directory, tmp_path / "adapter", targets=targets)
    receipt = convert(directory, tmp_path / "merged", adapter=adapter)
    expected = adapted_logits(directory, adapter)
    assert float((their_logits(tmp_path / "merged") - expected).abs().max()) < 1e-5 * float(expected.std())
    assert receipt["agreement"]["largest_logit_difference"] < 1e-4
    said = receipt["adapter"]
    assert "layers.1.mlp.experts.down_proj[2]" in said["changed"] and said["unchanged"] == []
    nothing = [name for name in said["adds_nothing_to"] if "layers.1." in name]
    assert nothing == ["layers.1.mlp.experts.gate_up_proj[3]", "layers.1.mlp.experts.down_proj[3]"]
    hows = {fate["how"] for fate in receipt["source_tensors"].values()}
    assert hows == {"tuned", "moved, bit for bit"}
    before, after = (load_file(path / "model.safetensors") for path in (directory, tmp_path / "merged"))
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name, fate in receipt["source_tensors"].items() if fate["how"] != "tuned"} <= same
    if family == "qwen3_moe":  # an expert that gets nothing is moved as it is
        assert {n for n in same if ".experts." in n} == {n for n in before if ".experts.3." in n}


def test_rounded_once(base, tmp_path) -> None:
    """W + s·B·A in float32, then bfloat16: not a rounded delta added to a rounded weight."""
    directory = base("olmoe", "bfloat16")
    adapter = adapter_of(directory, tmp_path / "adapter")
    convert(directory, tmp_path / "merged", adapter=adapter)
    before, after = (load_file(path / "model.safetensors") for path in (directory, tmp_path / "merged"))
    lora = load_file(adapter / WEIGHTS)
    name = "model.layers.0.mlp.experts.1.down_proj"
    A, B = (lora[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
    exact = before[f"{name}.weight"].double() + 2.0 * B @ A
    merged = after[f"{name}.weight"]
    assert merged.dtype == torch.bfloat16
    off = (merged.double() - exact).abs()
    assert bool((off <= exact.abs() * 2.0**-8 * 1.001).all()), "half a unit in the last place, and no more"


def test_packed_models_are_unpacked_and_merged(base, tmp_path) -> None:
    packed = PackedConfig(experts=Packing(format="int4", group_size=32), linear=Packing(format="int8"))
    quantize(open_source(base("mixtral")), tmp_path / "packed", packed, Sample(IDS, None))
    adapter = adapter_of(base("mixtral"), tmp_path / "adapter")
    convert(tmp_path / "packed", tmp_path / "merged", adapter=adapter, to="mixtral", dtype=torch.float32)
    expected = adapted_logits(tmp_path / "packed", adapter)
    assert float((their_logits(tmp_path / "merged") - expected).abs().max()) < 1e-5 * float(expected.std())


def test_a_gguf_file(base, tmp_path) -> None:
    """Whose tensors have other names than the adapter's."""
    adapter = adapter_of(base("olmoe"), tmp_path / "adapter")
    export(base("olmoe"), tmp_path / "model.gguf", file_type="f32", with_vocabulary=False)
    for source, target in ((tmp_path / "model.gguf", "from gguf"), (base("olmoe"), "merged")):
        convert(source, tmp_path / target, adapter=adapter)
    ours, right = (load_file(tmp_path / name / "model.safetensors") for name in ("from gguf", "merged"))
    assert ours.keys() == right.keys() and all(torch.equal(ours[name], right[name]) for name in right)


def test_a_delta_that_rounding_takes_away(base, tmp_path) -> None:
    directory = base("olmoe", "bfloat16")
    adapter = adapter_of(directory, tmp_path / "adapter", std=1e-7)
    with pytest.raises(CheckFailed, match=r"changes nothing in bfloat16.*try --dtype float32"):
        convert(directory, tmp_path / "merged", adapter=adapter)
    assert not (tmp_path / "merged").exists()
    convert(directory, tmp_path / "merged", adapter=adapter, dtype=torch.float32)


def test_one_experts_delta_that_is_lost(base, tmp_path, monkeypatch) -> None:
    """The fault that others' merges had: a base weight in the place of a merged one, and a success reported."""
    directory = base("qwen3_moe")
    adapter = adapter_of(directory, tmp_path / "adapter")
    real = merging._add

    def lost(weight, expert, **factors):
        return weight.float() if expert == 2 else real(weight, expert, **factors)

    monkeypatch.setattr(merging, "_add", lost)
    with pytest.raises(CheckFailed, match=r"experts\.gate_up_proj\[2\]: what was tuned changes nothing"):
        convert(directory, tmp_path / "merged", adapter=adapter, agreement=False)
    assert not (tmp_path / "merged").exists()


def test_a_delta_that_is_not_the_adapters(base, tmp_path, monkeypatch) -> None:
    """Changed, but otherwise: the two models disagree."""
    directory = base("qwen3_moe")
    adapter = adapter_of(directory, tmp_path / "adapter")
    real = merging._add
    monkeypatch.setattr(merging, "_add", lambda w, e, **f: real(w, e, **f | {"scale": -f["scale"]}))
    with pytest.raises(CheckFailed, match="does not agree"):
        convert(directory, tmp_path / "merged", adapter=adapter)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.experts.3.up_proj.weight"])
def test_another_tensor_that_changes(name, base, tmp_path, monkeypatch) -> None:
    directory = base("qwen3_moe")
    adapter = adapter_of(directory, tmp_path / "adapter")
    real = converting.Conversion.value

    def spoiled(self, target):
        value = real(self, target)
        return value + 1e-3 if target == name and self.edits else value

    monkeypatch.setattr(converting.Conversion, "value", spoiled)
    with pytest.raises(CheckFailed, match=rf"{re.escape(name)}: changed, and was not tuned"):
        convert(directory, tmp_path / "merged", adapter=adapter, agreement=False)
    assert not (tmp_path / "merged").exists()


def test_an_adapter_of_another_model(base, tmp_path) -> None:
    adapter = adapter_of(base("qwen3_moe"), tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="which this model does not have"):
        convert(base("mixtral"), tmp_path / "merged", adapter=adapter)
    assert not (tmp_path / "merged").exists()
    with pytest.raises(UserError, match="lies inside the source"):
        convert(base("qwen3_moe"), adapter / "merged", adapter=adapter)


def test_from_the_command_line(base, tmp_path) -> None:
    directory = base("mixtral")
    adapter = adapter_of(directory, tmp_path / "adapter")
    done = manyhands("convert", str(directory), str(tmp_path / "merged"), "--adapter", str(adapter))
    assert done.returncode == 0, done.stderr
    assert "matrices, experts one by one, have changed; to 6 it adds nothing" in done.stdout
    fused = manyhands(
        "convert", str(directory), str(tmp_path / "fused"), "--adapter", str(adapter), "--as-adapter", "fused"
    )
    assert fused.returncode == 0 and "rank 3" in fused.stdout, fused.stderr
    assert "base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight" in load_file(
        tmp_path / "fused" / WEIGHTS
    )
    assert torch.equal(adapted_logits(directory, tmp_path / "fused"), adapted_logits(directory, adapter))
    for arguments, message in (
        (["model.gguf", "--adapter", str(adapter)], "--adapter merges into a directory"),
        (["other", "--as-adapter", "fused"], "is a model: --adapter DIR says which adapter of it"),
        (["other", "--adapter", str(directory)], "adapter_config.json: does not exist"),
        (["other", "--adapter", str(tmp_path / "nowhere")], "adapter_config.json: does not exist"),
        (
            ["other", "--adapter", str(adapter / WEIGHTS)],
            "is a file; name the directory that holds adapter_config.json",
        ),
        (["other.gguf", "--adapter", str(adapter), "--as-adapter", "fused"], "--as-adapter writes a directory"),
        (["other", "--adapter", str(adapter), "--as-adapter", "fused", "--dtype", "float16"], "not with NAME.gguf"),
    ):
        refused = manyhands("convert", str(directory), str(tmp_path / arguments[0]), *arguments[1:])
        assert refused.returncode == 2 and message in refused.stderr and len(refused.stderr.splitlines()) == 1
        assert not (tmp_path / arguments[0]).exists()


def test_exported_in_the_form_it_had(base, tmp_path) -> None:
    """Experts one by one -> fused -> experts one by one: the same bytes."""
    directory = base("olmoe")
    adapter = adapter_of(directory, tmp_path / "adapter")
    said = export_adapter(directory, tmp_path / "fused", form="fused", adapter=adapter)
    assert set(said["ranks"].values()) == {3}
    export_adapter(directory, tmp_path / "again", form="per-expert", adapter=tmp_path / "fused")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (adapter / WEIGHTS).read_bytes()
    fields = [json.loads((path / "adapter_config.json").read_text()) for path in (adapter, tmp_path / "again")]
    assert fields[0] == fields[1]


def test_nothing_to_merge(base, tmp_path) -> None:
    adapter = adapter_of(base("olmoe"), tmp_path / "adapter")
    tensors = load_file(adapter / WEIGHTS)
    save_file({n: t if "lora_A" in n else torch.zeros_like(t) for n, t in tensors.items()}, adapter / WEIGHTS)
    with pytest.raises(CheckFailed, match="changes no tensor of its base"):
        convert(base("olmoe"), tmp_path / "merged", adapter=adapter)
