"""What `plan` accepts, and the one line it ends in for what it does not."""

import json
from pathlib import Path
from typing import Any

import pytest

from manyhands.catalog import load
from manyhands.checkpoint.tensors import DTYPES
from manyhands.errors import ConfigError
from manyhands.families import FAMILIES, export_config
from manyhands.plan import own_files
from manyhands.plan.load_file import read_load
from manyhands.plan.storage import weight_bytes
from manyhands.plan.stored_dtype import native_storage
from manyhands.plan.subject import read_subject

MIXTRAL: dict[str, Any] = {
    "model_type": "mixtral",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "intermediate_size": 14336,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32768,
    "torch_dtype": "bfloat16",
}


def config_file(folder: Path, **changes: Any) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps(MIXTRAL | changes))
    return str(path)


def test_all_the_ways_to_name_one_model(tmp_path: Path) -> None:
    total = 46_702_792_704
    assert read_subject("mixtral-8x7b").counts.total == read_subject("Mixtral-8x7B").counts.total == total
    assert read_subject(config_file(tmp_path)).counts.total == total
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    directory = read_subject(str(tmp_path))
    assert directory.counts.total == total and directory.file_bytes == 1000
    assert directory.native is not None and directory.native.name == "bf16"


def test_presets_run_files_and_runs(tmp_path: Path) -> None:
    preset = read_subject("tiny", ["model.hidden_size=64"])
    assert preset.config is not None and preset.config.hidden_size == 64
    (tmp_path / "run.yaml").write_text("model: {hidden_size: 64}")
    assert read_subject(str(tmp_path / "run.yaml")).counts == read_subject(str(tmp_path)).counts
    with pytest.raises(ConfigError, match="changes run files and presets only"):
        read_subject(str(tmp_path / "config.json"), ["model.hidden_size=64"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_local_experts": 10**12}, "num_experts = 1000000000000"),
        ({"num_local_experts": int("9" * 4000)}, "num_local_experts = 9999"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000"),
        ({"hidden_size": -4}, "hidden_size = -4"),
        ({"hidden_size": float("nan")}, "hidden_size = nan: expected a finite"),
        ({"hidden_size": float("-inf")}, "hidden_size = -inf: expected a finite"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok = 9 exceeds num_experts = 8"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0"),
        ({"model_type": ["mixtral"]}, "model_type"),
        ({"model_type": "acme", "num_local_experts": 10**12}, "num_experts = 1000000000000"),
        ({"model_type": "acme", "num_experts_per_tok": 9}, "num_experts_per_tok = 9 exceeds"),
        ({"model_type": "acme", "num_attention_heads": -3}, "num_attention_heads = -3"),
        ({"model_type": "acme", "hidden_size": "4096"}, "hidden_size = '4096'"),
        ({"model_type": "acme", "hidden_size": None}, "'hidden_size' or 'n_embd'"),
        ({"model_type": "acme", "mamba_d_state": 16}, "'mamba_d_state'"),
        ({"model_type": "acme", "is_encoder_decoder": True}, "'is_encoder_decoder'"),
    ],
)
def test_hostile_configurations_end_in_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_subject(config_file(tmp_path, **changes))
    assert message in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400 + len(str(tmp_path))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[1]",
        b'{"a":',
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'{"x":' * 90_000,
        b" " * (2 << 20),
        b'{"a":' + b"9" * 5000,
    ],
    ids=["empty", "list", "cut", "binary", "deep list", "deep object", "long", "digits"],
)
def test_files_that_are_no_configuration(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError) as error:
        read_subject(str(tmp_path))
    assert "\n" not in str(error.value) and "config.json" in str(error.value)


def test_an_unknown_family_is_planned_and_says_so(tmp_path: Path) -> None:
    subject = read_subject(config_file(tmp_path, model_type="acme_moe", odd_thing=3))
    assert subject.counts.total == 46_702_792_704
    notes = " ".join(subject.notes)
    assert "'acme_moe' is not a family" in notes
    assert "experts = num_local_experts (8)" in notes and "experts per token = num_experts_per_tok (2)" in notes
    assert "not looked at: odd_thing" in notes


def test_the_usual_fields_count_known_families_right(tmp_path: Path) -> None:
    """DeepSeek's fields under another name: all but the selection biases, which are no parameters."""
    fields = load("deepseek-v3").config_fields
    assert fields is not None
    (tmp_path / "config.json").write_text(json.dumps(fields | {"model_type": "acme"}))
    assert read_subject(str(tmp_path)).counts.total == read_subject("deepseek-v3").counts.total


def test_our_own_checkpoints(tmp_path: Path) -> None:
    config = read_subject("tiny").config
    assert config is not None
    (tmp_path / "config.json").write_text(json.dumps(export_config(FAMILIES["manyhands"], config)))
    subject = read_subject(str(tmp_path))
    assert subject.config == config and subject.native is not None and subject.native.name == "fp32"


def test_names_that_are_nothing() -> None:
    with pytest.raises(ConfigError, match="nearest names: deepseek-v3"):
        read_subject("deepsek-v3")
    with pytest.raises(ConfigError, match="not in the catalogue"):
        read_subject("zzzzzz")


def test_rumours_only_when_asked() -> None:
    with pytest.raises(ConfigError, match="--include-rumours"):
        read_subject("gpt-4")
    subject = read_subject("gpt-4", include_rumours=True)
    assert subject.notes[0].startswith("RUMOUR") and subject.sizes is None
    with pytest.raises(ConfigError, match=r"kimi-k2\.5"):
        read_subject("composer-2")
    with pytest.raises(ConfigError, match="not public"):
        read_subject("claude", include_rumours=True)


def test_native_formats() -> None:
    fp8, _ = native_storage({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}})
    assert fp8 is not None and (fp8.routed, fp8.rest) == (8 + 32 / 16384, 16)
    mxfp4, _ = native_storage({"quantization_config": {"quant_method": "mxfp4"}})
    assert mxfp4 is not None and mxfp4.shown() == "4.25/16/16/16"
    groups = {"group_0": {"weights": {"num_bits": 4, "group_size": 32}}}
    int4 = {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": ["re:.*self_attn.*", "lm_head"]}
    found, _ = native_storage({"quantization_config": int4})
    assert found is not None and found.shown() == "4.5/4.5/16/16, attention 16"
    for method in ("hqq", "aqlm", "awq", None):
        unknown, note = native_storage({"quantization_config": {"quant_method": method}})
        assert unknown is None and note is not None and str(method) in note
    assert native_storage({})[1] is not None, "no dtype: taken as bf16, and said"


def _ct(bits: int, kind: str, **weights: Any) -> dict[str, Any]:
    activations = {"num_bits": 8, "dynamic": True}
    group = {"weights": {"num_bits": bits, "type": kind, **weights}, "targets": ["Linear"]}
    if bits == 8:
        group["input_activations"] = activations
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": ["lm_head"]}


ATTENTION = ["re:.*attn.*", "lm_head"]


@pytest.mark.parametrize(
    ("quantization", "name", "bits"),
    [
        (_ct(8, "float", strategy="channel"), "fp8-dynamic", "8/8/16/16"),
        (_ct(8, "int", strategy="channel"), "w8a8", "8/8/16/16"),
        (_ct(4, "int", group_size=128), "w4a16-g128", "4.125/4.125/16/16"),
        (_ct(4, "int", group_size=128, symmetric=False), "w4a16-g128", "4.156/4.156/16/16"),
        (_ct(4, "float", group_size=16), "nvfp4-a16", "4.5/4.5/16/16"),
        (_ct(4, "int", group_size=32) | {"ignore": ATTENTION}, "w4a16-g32", "4.5/4.5/16/16, attention 16"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "awq-4bit-g128", "4.156/4.156/16/16"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq-4bit-g128", "4.156/4.156/16/16"),
        (
            {"quant_method": "awq", "bits": 4, "group_size": 128, "modules_to_not_convert": ["self_attn"]},
            "awq-4bit-g128",
            "4.156/4.156/16/16, attention 16",
        ),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
            "bnb-nf4",
            "4.5/4.5/16/16",
        ),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bnb-int8", "8/8/16/16"),
        ({"quant_method": "fbgemm_fp8"}, "fbgemm-fp8", "8/8/16/16"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "exclude_modules": ["lm_head"]}, "nvfp4", "4.5/4.5/16/16"),
    ],
)
def test_every_published_scheme_by_its_own_bits(quantization: dict[str, Any], name: str, bits: str) -> None:
    found, note = native_storage({"quantization_config": quantization})
    assert found is not None and note is None and (found.name, found.shown()) == (name, bits)


def test_dtype_null_stands_beside_torch_dtype() -> None:
    found, note = native_storage({"dtype": None, "torch_dtype": "float32"})
    assert found is not None and found.name == "fp32" and note is None
    assert native_storage({"dtype": "float64"})[0] is None


def test_a_packed_model_of_ours_is_planned_by_its_bytes(tmp_path: Path) -> None:
    """The file is what `quantize` writes; without it, what the description says."""
    import torch

    from manyhands.checkpoint.packed import packed_headers
    from manyhands.config import PackedConfig

    config = read_subject("tiny").config
    assert config is not None
    packing = {"experts": {"format": "int4", "group_size": 32}, "linear": {"format": "int8"}}
    packed = PackedConfig.model_validate(packing)
    fields = export_config(FAMILIES["manyhands"], config) | {"packed": packed.model_dump()}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    described = read_subject(str(tmp_path)).native
    assert described is not None and described.shown() == "4.5/8/16/16, head 8"
    headers = packed_headers(config, packed, lambda name: torch.float32)
    size = {"U8": 1, "F32": 4}
    total = sum(torch.Size(h.shape).numel() * size[h.dtype] for n, h in headers.items() if "correction_bias" not in n)
    text = json.dumps(
        {n: {"dtype": h.dtype, "shape": list(h.shape), "data_offsets": [0, 0]} for n, h in headers.items()}
    )
    (tmp_path / "model.safetensors").write_bytes(len(text.encode()).to_bytes(8, "little") + text.encode())
    subject = read_subject(str(tmp_path))
    assert subject.native is not None and subject.native.name == "packed"
    assert weight_bytes(subject.counts, subject.native) == pytest.approx(total, rel=1e-12)


def test_a_recorded_load(tmp_path: Path) -> None:
    config = read_subject("tiny").config
    assert config is not None and config.moe is not None
    layers, experts = config.sparse_layers, config.moe.router.num_experts
    shares = [1.0] + [0.0] * (experts - 1)
    step = {"kind": "step", "moe": {str(layer): {"load": shares} for layer in layers}}
    journal = tmp_path / "journal.jsonl"
    journal.write_text(json.dumps(step | {"moe": {}}) + "\n" + json.dumps(step) + "\n" + '{"kind":"end"}\n')
    assert read_load(journal, config) == [shares] * len(layers)
    evaluation = tmp_path / "eval.json"
    evaluation.write_text(json.dumps({"load": {str(layer): {"load": [3] * experts} for layer in layers}}))
    assert read_load(evaluation, config) == [[1 / experts] * experts] * len(layers)
    for wrong in ("{}", "[1]", '{"load": {"0": [1, 2]}}', "nonsense", '{"load": {"99": {"load": [1]}}}'):
        evaluation.write_text(wrong)
        with pytest.raises(ConfigError, match=r"eval\.json"):
            read_load(evaluation, config)


def test_the_planner_knows_the_bytes_of_the_dtypes_it_reads() -> None:
    """It imports no torch, so it states them; here they are the readers'."""
    assert {name: DTYPES[name].itemsize for name in own_files._BYTES} == own_files._BYTES
