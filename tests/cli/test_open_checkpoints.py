"""A published family's directory through every verb, as a user has it: no manifest, a tokenizer, a chat template."""

import json
import shutil

import pytest

from manyhands.checkpoint.model import load, save
from manyhands.cli.main import app
from manyhands.config import ModelConfig
from manyhands.errors import CheckpointError
from manyhands.models import Decoder, init_weights
from manyhands.text import Tokenizer

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
FAMILIES = {
    "mixtral": {"attention": {"num_attention_heads": 2, "head_dim": 16, "sliding_window": 8}},
    "deepseek_v3": {
        "attention": {
            "kind": "mla", "num_attention_heads": 2, "q_lora_rank": None, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8, "v_head_dim": 8, "latent_norm_eps": 1e-6,
        },
        "rope": {"interleave": True},
        "moe": {
            "router": {"num_experts": 4, "num_experts_per_tok": 2, "score": "sigmoid", "bias": True},
            "moe_intermediate_size": 16, "n_shared_experts": 1, "first_k_dense_replace": 1,
        },
    },
    "gpt_oss": {
        "hidden_act": "swiglu_oai",
        "attention": {
            "num_attention_heads": 2, "head_dim": 16, "sinks": True, "attention_bias": True, "output_bias": True,
            "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"],
        },
        "moe": {
            "router": {"num_experts": 4, "num_experts_per_tok": 2, "logit_bias": True}, "moe_intermediate_size": 16,
            "hidden_act": "swiglu_oai", "expert_bias": True,
        },
    },
    "llama": {"moe": None, "attention": {"num_attention_heads": 2, "head_dim": 16}},
}  # fmt: skip


@pytest.fixture(scope="module", params=list(FAMILIES))
def directory(request, tmp_path_factory):
    """As the publisher would have it: without our manifest."""
    path = tmp_path_factory.mktemp("open") / request.param
    tokenizer = Tokenizer.train(["the quick brown fox jumps over the lazy dog\n" * 20], 280).with_chat_template(
        TEMPLATE
    )
    values = {
        "vocab_size": 288, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 16,
        "max_position_embeddings": 128, "initializer_range": 0.3,
        "moe": {"router": {"num_experts": 4, "num_experts_per_tok": 2}, "moe_intermediate_size": 16},
    }  # fmt: skip
    model = Decoder(ModelConfig(**values | FAMILIES[request.param]))
    init_weights(model, seed=0)
    save(model, path, tokenizer, family=request.param)
    (path / "manifest.json").unlink()
    return path


def run(capsys, *arguments):
    app([str(argument) for argument in arguments], standalone_mode=False)
    return capsys.readouterr().out


def test_generate_and_eval(directory, capsys, tmp_path):
    out = json.loads(run(capsys, "generate", directory, "--prompt", "the quick", "--max-new-tokens", "5", "--json"))
    assert len(out["token_ids"]) <= 5 and out["finish_reason"] in ("length", "stop")
    (tmp_path / "text.txt").write_text("the lazy dog jumps over the quick brown fox\n" * 10)
    found = json.loads(run(capsys, "eval", directory, "--data", tmp_path / "text.txt", "--json"))
    assert found["loss"] > 0 and (bool(found["load"]) == ("llama" not in directory.name))


def test_chat(directory, capsys, monkeypatch):
    import io
    import sys

    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nand again\n"))
    run(capsys, "chat", directory, "--max-new-tokens", "4")


def test_convert_and_load(directory, capsys, tmp_path):
    run(capsys, "convert", directory, tmp_path / "ours", "--to", "manyhands")
    run(capsys, "convert", tmp_path / "ours", tmp_path / "back", "--to", directory.name)
    model, tokenizer = load(tmp_path / "back")
    assert model.family == directory.name and tokenizer.chat_template == TEMPLATE


def test_an_unknown_field_can_be_read_past(directory, capsys, caplog, tmp_path):
    """Refused with the remedy; with it every verb works, says so in a line and leaves it in the receipt."""
    shutil.copytree(directory, tmp_path / "odd")
    odd = tmp_path / "odd"
    config = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps(config | {"merge_notes": {"a": 1}}))
    with pytest.raises(
        CheckpointError, match="if it changes nothing: --ignore-field merge_notes, in Python ignore_fie"
    ):
        load(odd)
    asked = ("--ignore-field", "merge_notes")
    run(capsys, "generate", odd, "--prompt", "the", "--max-new-tokens", "1", *asked)
    assert caplog.messages == [f"{odd / 'config.json'}: ignored, as asked: merge_notes"]
    (tmp_path / "text.txt").write_text("the lazy dog jumps over the quick brown fox\n" * 10)
    run(capsys, "eval", odd, "--data", tmp_path / "text.txt", "--json", *asked)
    for verb in ("convert", "quantize"):
        run(capsys, verb, odd, tmp_path / verb, *asked)
        assert json.loads((tmp_path / verb / "receipt.json").read_text())["source"]["ignored_fields"] == ["merge_notes"]
        load(tmp_path / verb)
    assert len(caplog.messages) == 4, "each verb says it once"
    model, _ = load(odd, ignore_fields=["merge_notes"])
    model.save(tmp_path / "saved")
    load(tmp_path / "saved")
