"""Models as GGUF files: what was written is what was there, and what llama.cpp would compute otherwise is refused."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from manyhands.checkpoint.find import open_checkpoint
from manyhands.checkpoint.gguf.blocks import FILE_TYPES, FileType
from manyhands.checkpoint.gguf.export import export, said
from manyhands.checkpoint.model import load, load_model, save
from manyhands.config import ModelConfig, PackedConfig, Packing
from manyhands.config.load import load_preset
from manyhands.errors import CheckpointError, ConfigError, UserError
from manyhands.families.gguf.written import first_fit, written_as
from manyhands.models import Decoder
from manyhands.quantize.quantize import quantize
from tests.checkpoint.gguf_models import MODELS, family_of, randomise, saved, tokenizer

IDS = torch.randint(0, 300, (2, 17), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("file_type", ["f32", "bf16"])
def test_what_comes_back_is_the_same_model_bit_for_bit(case: str, file_type: FileType, tmp_path: Path) -> None:
    dtype = torch.float32 if file_type == "f32" else torch.bfloat16
    saved(case, tmp_path / "model", dtype)
    receipt = export(tmp_path / "model", tmp_path / "model.gguf", file_type=file_type)
    assert all(entry["relative_error"] == 0 for entry in receipt["tensors"].values())
    before = load_model(tmp_path / "model")
    after, words = load(tmp_path / "model.gguf")
    assert after.family == family_of(case)
    state = after.state_dict()
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor.float(), state[name].float()), name
    with torch.no_grad():
        ours, theirs = (model(IDS, dtype=torch.float32).logits for model in (before, after))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)  # mapped elsewhere: sums in another order
    assert words.encode("naïve 1234\n\n x") == tokenizer().encode("naïve 1234\n\n x")


@pytest.mark.parametrize("file_type", FILE_TYPES)
def test_blocks_are_those_of_the_gguf_package(file_type: FileType, tmp_path: Path) -> None:
    model = saved("dots1", tmp_path / "model")
    receipt = export(tmp_path / "model", tmp_path / "model.gguf", file_type=file_type)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    state = model.state_dict()
    gate = state["layers.1.mlp.experts.gate_up_proj"][:, :32].numpy()
    found = tensors["blk.1.ffn_gate_exps.weight"]
    wanted = gguf.GGMLQuantizationType[file_type.upper()]
    assert found.tensor_type == wanted
    assert np.array_equal(found.data.view(np.uint8), gguf.quants.quantize(gate, wanted).view(np.uint8))
    for name in ("blk.1.ffn_gate_inp.weight", "blk.1.exp_probs_b.bias", "blk.0.attn_norm.weight"):
        assert tensors[name].tensor_type == gguf.GGMLQuantizationType.F32
    assert np.array_equal(tensors["blk.2.ffn_gate_inp.weight"].data, state["layers.2.mlp.router.weight"].numpy())
    back = gguf.quants.dequantize(found.data, wanted)
    error = receipt["tensors"]["blk.1.ffn_gate_exps.weight"]["relative_error"]
    assert error == pytest.approx(float(np.linalg.norm(back - gate) / np.linalg.norm(gate)), rel=1e-4, abs=1e-12)
    assert str(receipt["target"]["size"]) and "dots1 -> dots1" in said(receipt)


def test_rows_that_are_no_whole_blocks_are_float16(tmp_path: Path) -> None:
    values = MODELS["dots1"] | {"intermediate_size": 40}
    model = randomise(Decoder(ModelConfig.model_validate(values)))
    save(model, tmp_path / "model", tokenizer(), family="dots1")
    types = {
        name: entry["type"]
        for name, entry in export(tmp_path / "model", tmp_path / "m.gguf", file_type="q4_0")["tensors"].items()
    }
    assert types["blk.0.ffn_down.weight"] == "F16"  # [64, 40]
    assert types["blk.0.ffn_up.weight"] == "Q4_0"
    assert types["token_embd.weight"] == types["output.weight"] == "Q8_0"


def test_packed_weights_are_decoded(tmp_path: Path) -> None:
    saved("dots1", tmp_path / "model")
    packing = Packing(format="q8_0", group_size=32)
    quantize(
        open_checkpoint(tmp_path / "model"),
        tmp_path / "packed",
        PackedConfig(experts=packing, linear=packing),
        measure=False,
    )
    export(tmp_path / "packed", tmp_path / "model.gguf", file_type="f32", to="dots1")
    packed, written = load_model(tmp_path / "packed", decode=True), load_model(tmp_path / "model.gguf")
    for name, tensor in packed.state_dict().items():
        assert torch.equal(tensor, written.state_dict()[name]), name


def test_the_quickstart_has_an_architecture() -> None:
    plan = first_fit(load_preset("quickstart").model)
    assert plan.arch.name in ("glm4moe", "dots1")


def _changed(case: str, path: str, value: Any) -> ModelConfig:
    values = json.loads(json.dumps(MODELS[case]))
    *sections, name = path.split(".")
    inner = values
    for section in sections:
        inner = inner.setdefault(section, {})
    inner[name] = value
    return ModelConfig.model_validate(values)


@pytest.mark.parametrize(
    ("case", "path", "value", "said"),
    [
        ("olmoe", "moe.router.norm_topk_prob", True, "moe.router.norm_topk_prob = True here, False there"),
        ("qwen3_moe", "moe.router.norm_topk_prob", False, "moe.router.norm_topk_prob = False here, True there"),
        ("mixtral", "attention.sliding_window", 16, "attention.sliding_window = 16 here, None there"),
        ("dots1", "attention.num_key_value_heads", 2, "attention.num_key_value_heads = 2 here, 4 there"),
        ("dots1", "moe.n_shared_experts", 0, "moe.n_shared_experts = 0 here, at least 1 there"),
        ("dots1", "attention.output_bias", True, "attention.output_bias = True here"),
        ("glm4_moe", "attention.output_bias", True, "attention.output_bias = True here"),
        ("deepseek_v3", "rms_norm_eps", 1e-5, "latent_norm_eps = 1e-06 here, rms_norm_eps = 1e-05 there"),
        ("deepseek_v3", "attention.q_lora_rank", None, "attention.q_lora_rank = None here"),
        ("deepseek_v3", "rope.beta_fast", 16.0, "rope.beta_fast = 16.0 here, 32.0 there"),
        ("deepseek_v3", "rope.interleave", False, "rope.interleave = False here, True there"),
        ("llama, 3.1's rotation", "rope.low_freq_factor", 2.0, "llama3 with other factors"),
        ("qwen3", "output_multiplier", 0.5, "output_multiplier = 0.5 here, 1.0 there"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused_by_name(case: str, path: str, value: Any, said: str) -> None:
    written_as(ModelConfig.model_validate(MODELS[case]), family_of(case))
    with pytest.raises(ConfigError) as error:
        written_as(_changed(case, path, value), family_of(case))
    assert said in str(error.value)


def test_a_model_of_ones_own_that_nothing_holds_says_what_is_nearest() -> None:
    config = load_preset("quickstart").model
    with pytest.raises(ConfigError, match=r"no architecture .* output_norms = True here, False there"):
        first_fit(config.model_copy(update={"output_norms": True}))


def test_a_tokenizer_without_a_name_in_gguf_is_refused_and_can_be_left_out(tmp_path: Path) -> None:
    model = randomise(Decoder(ModelConfig.model_validate(MODELS["dots1"])))
    save(model, tmp_path / "model", tokenizer(None), family="dots1")
    with pytest.raises(CheckpointError, match=r"none of the rules .*llama-bpe, qwen2, gpt-2.*--without-vocabulary"):
        export(tmp_path / "model", tmp_path / "model.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    receipt = export(tmp_path / "model", tmp_path / "model.gguf", with_vocabulary=False)
    assert receipt["target"]["vocabulary"]["model"] == "none"
    save(model, tmp_path / "bare", None, family="dots1")
    with pytest.raises(CheckpointError, match="the checkpoint has no tokenizer"):
        export(tmp_path / "bare", tmp_path / "bare.gguf")


def test_the_vocabulary_is_what_llama_cpp_needs(tmp_path: Path) -> None:
    words = tokenizer().with_chat_template("{{ messages[0].content }}")
    save(randomise(Decoder(ModelConfig.model_validate(MODELS["dots1"]))), tmp_path / "model", words, family="dots1")
    export(tmp_path / "model", tmp_path / "model.gguf", file_type="q8_0")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "model.gguf").fields.items()}
    assert fields["tokenizer.ggml.model"] == "gpt2" and fields["tokenizer.ggml.pre"] == "llama-bpe"
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == 320  # every row of the embedding
    assert tokens[0] == "<|endoftext|>" and kinds[0] == 3 and kinds[1] == 1
    used = words.vocab_size
    assert kinds[used:] == [5] * (320 - used)
    assert fields["tokenizer.ggml.eos_token_id"] == 0 and fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.chat_template"] == "{{ messages[0].content }}"
    text = fields["tokenizer.huggingface.json"]
    assert json.loads(text)["model"]["merges"][0] == fields["tokenizer.ggml.merges"][0].split(" ")


def test_what_exists_stays_unless_this_program_made_it_and_it_was_asked(tmp_path: Path) -> None:
    saved("dots1", tmp_path / "model")
    target = tmp_path / "model.gguf"
    target.write_bytes(b"somebody's notes")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="was not made by this program"):
            export(tmp_path / "model", target, overwrite=overwrite)
    assert target.read_bytes() == b"somebody's notes"
    target.unlink()
    export(tmp_path / "model", target, file_type="f32")
    before = target.read_bytes()
    with pytest.raises(UserError, match="exists; choose another name, or --overwrite"):
        export(tmp_path / "model", target)
    export(tmp_path / "model", target, file_type="f32", overwrite=True)
    assert target.read_bytes() == before
    with pytest.raises(UserError, match="lies inside the source"):
        export(tmp_path / "model", tmp_path / "model" / "new.gguf")
    with pytest.raises(UserError, match="are the same file"):
        export(target, target, overwrite=True)


def test_a_failure_on_the_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved("dots1", tmp_path / "model")

    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("manyhands.checkpoint.gguf.export.encoded", full)
    with pytest.raises(Exception, match="No space left on device"):
        export(tmp_path / "model", tmp_path / "model.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_file_is_written_again_from_a_file(tmp_path: Path) -> None:
    saved("mixtral", tmp_path / "model")
    export(tmp_path / "model", tmp_path / "a.gguf", file_type="q8_0")
    receipt = export(tmp_path / "a.gguf", tmp_path / "b.gguf", file_type="q8_0")
    one, two = (gguf.GGUFReader(tmp_path / name).tensors for name in ("a.gguf", "b.gguf"))
    assert all(np.array_equal(a.data, b.data) for a, b in zip(one, two, strict=True))
    assert max(entry["relative_error"] for entry in receipt["tensors"].values()) < 1e-7
