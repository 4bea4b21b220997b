"""`manyhands quantize` from end to end, on small models of several families as publishers have them."""

import hashlib
import json
import math
import shutil

import pytest
import torch
from safetensors import safe_open

from manyhands.checkpoint.model import load, load_model, save
from manyhands.cli.main import app
from manyhands.cli.quantize import advice
from manyhands.config import ModelConfig, RecurrentConfig
from manyhands.errors import CheckpointError, ConfigError, DataError, UserError
from manyhands.generate.evaluate import evaluate
from manyhands.models import Decoder, Recurrent, init_weights
from manyhands.text import Tokenizer, evaluation_batches

from .test_open_checkpoints import FAMILIES as OPEN

FAMILIES = OPEN | {
    "dots1": {
        "attention": {"num_attention_heads": 2, "head_dim": 16, "qk_norm": "head"},
        "moe": {
            "router": {"num_experts": 4, "num_experts_per_tok": 2, "score": "sigmoid", "bias": True},
            "moe_intermediate_size": 16, "n_shared_experts": 1, "first_k_dense_replace": 1,
        },
    },
}  # fmt: skip
TEXT = "the quick brown fox jumps over the lazy dog, and the dog does not mind\n" * 60


@pytest.fixture(scope="module", params=list(FAMILIES))
def directory(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / request.param
    values = {
        "vocab_size": 288, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 16,
        "max_position_embeddings": 128, "initializer_range": 0.3,
        "moe": {"router": {"num_experts": 4, "num_experts_per_tok": 2}, "moe_intermediate_size": 16},
    }  # fmt: skip
    model = Decoder(ModelConfig(**values | FAMILIES[request.param]))
    init_weights(model, seed=0)
    save(model, path, Tokenizer.train([TEXT], 280), family=request.param)
    (path / "manifest.json").unlink()
    return path


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    """In bfloat16, as most are, without a tokenizer."""
    path = tmp_path_factory.mktemp("source") / "mixtral"
    config = ModelConfig(
        vocab_size=64, hidden_size=64, intermediate_size=32, num_hidden_layers=2, max_position_embeddings=64,
        attention={"num_attention_heads": 2, "head_dim": 32, "sliding_window": 16}, initializer_range=0.3,
        moe={"router": {"num_experts": 4, "num_experts_per_tok": 2}, "moe_intermediate_size": 32},
    )  # fmt: skip
    model = Decoder(config)
    init_weights(model, seed=0)
    save(model, path, family="mixtral", dtype=torch.bfloat16)
    return path


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def run(capsys, *arguments):
    app([str(argument) for argument in arguments], standalone_mode=False)
    return capsys.readouterr()


def test_from_end_to_end(directory, tmp_path, text, capsys):
    target = tmp_path / "packed"
    receipt = json.loads(run(capsys, "quantize", directory, target, "--data", text, "--json").out)
    assert json.loads((target / "receipt.json").read_text()) == receipt

    with safe_open(directory / "model.safetensors", "pt") as source:  # every source tensor, as it was
        assert set(receipt["source_tensors"]) == set(source.keys())
        for name, fate in receipt["source_tensors"].items():
            raw = source.get_tensor(name).contiguous().view(torch.uint8).numpy().tobytes()
            assert fate["sha256"] == hashlib.sha256(raw).hexdigest() and fate["became"]
    with safe_open(target / "model.safetensors", "pt") as packed:  # every new one, accounted for
        names = set(packed.keys())
        assert names == set(receipt["packed_tensors"]) | set(receipt["not_quantised"])
        assert names == {name for fate in receipt["source_tensors"].values() for name in fate["became"]}
        total = sum(packed.get_tensor(name).nbytes for name in names)
    assert sum(kind["bytes_after"] for kind in receipt["classes"].values()) == total
    before = sum(kind["bytes_before"] for kind in receipt["classes"].values())
    assert before == sum(t.nbytes for t in load_model(directory).state_dict().values())

    kept = receipt["not_quantised"]
    assert kept["embed_tokens.weight"] and kept["norm.weight"] and "lm_head.weight" not in kept
    routers = [name for name in kept if ".router.weight" in name]
    model, tokenizer = load(target)
    assert len(routers) == len(model.sparse_layers()) and all("float32" in kept[name] for name in routers)
    for record in receipt["packed_tensors"].values():
        for ours, error in record["relative_error"].items():
            assert 0 < error < (0.15 if "int4" in record["format"] else 0.02), (ours, error)

    for key, entry in (("source", directory), ("target", target)):
        for name, file in receipt[key]["files"].items():
            assert file["sha256"] == hashlib.sha256((entry / name).read_bytes()).hexdigest()

    found = receipt["perplexity"]  # the figures are the loaded models' own
    ids = tokenizer.encode(TEXT) + sorted(tokenizer.eos_token_ids)
    length, rows = 128, (len(ids) - 1) // 128
    calibrating = rows - max(1, rows // 4)  # the figures are of the other rows
    assert 0 < calibrating < rows
    sample = torch.tensor(ids[calibrating * length : rows * length + 1]).numpy()
    for when, path in (("before", directory), ("after", target)):
        measured = evaluate(load_model(path), evaluation_batches(sample, length, rows - calibrating))
        assert math.isclose(measured.perplexity, found[when], rel_tol=1e-4), when
    agreement = receipt["routing_agreement"]
    if model.config.moe is None:
        assert agreement["overall"] is None and not receipt["calibration"]["tokens_per_expert"]
    else:
        assert set(agreement["layers"]) == {str(layer) for layer in model.sparse_layers()}
        assert 0.8 < agreement["overall"] <= 1
        for counts in receipt["calibration"]["tokens_per_expert"].values():
            assert sum(counts) == calibrating * length * 2


def test_the_packed_model_goes_through_every_verb(directory, tmp_path, text, capsys):
    target = tmp_path / "packed"
    printed = run(capsys, "quantize", directory, target, "--max-batches", 1)
    assert "perplexity" in printed.out and "the standard library's sources" in printed.out
    out = json.loads(run(capsys, "generate", target, "--prompt", "the", "--max-new-tokens", "4", "--json").out)
    assert len(out["token_ids"]) <= 4
    assert json.loads(run(capsys, "eval", target, "--data", text, "--json").out)["loss"] > 0
    run(capsys, "convert", target, tmp_path / "back", "--to", directory.name)
    model, _ = load(tmp_path / "back")
    ids = torch.randint(0, 280, (1, 20))
    torch.testing.assert_close(model(ids).logits, load_model(target, decode=True)(ids).logits, atol=1e-4, rtol=1e-4)


def test_without_a_tokenizer(mixtral, tmp_path, text, capsys):
    target = tmp_path / "packed"
    receipt = json.loads(run(capsys, "quantize", mixtral, target, "--json").out)
    assert receipt["perplexity"] is None and receipt["calibration"] is None
    assert receipt["routing_agreement"]["on"] == "random token ids"
    model = load_model(target)
    assert model.embed_tokens.weight.dtype == torch.bfloat16
    assert all(layer.router.weight.dtype == torch.float32 for layer in model.sparse_layers().values())
    assert model(torch.tensor([[1, 2]])).logits.dtype == torch.bfloat16
    with pytest.raises(DataError, match=r"there is no tokenizer\.json; .*; and --data is text"):
        run(capsys, "quantize", mixtral, target, "--data", text, "--overwrite")


@pytest.mark.parametrize("group", [32, 64])
def test_bytes_and_bits(mixtral, tmp_path, group, capsys):
    arguments = ("--experts", "int4", "--linear", "int4", "--group-size", group, "--json")
    receipt = json.loads(run(capsys, "quantize", mixtral, tmp_path / "packed", *arguments).out)
    layout = load_model(tmp_path / "packed").layers[0].mlp.experts.layout
    assert layout.group_size == group and layout.format == "int4"
    assert receipt["target"]["packed"]["experts"] == {"format": "int4", "group_size": group}
    assert receipt["classes"]["experts"]["bytes_after"] == 2 * 4 * layout.record_bytes
    assert receipt["classes"]["router"]["format"] == "float32"


def test_more_bits_err_less(mixtral, tmp_path, capsys):
    errors = {}
    for format in ("int4", "int8", "bf16"):
        receipt = json.loads(run(capsys, "quantize", mixtral, tmp_path / format, "--experts", format, "--json").out)
        record = receipt["packed_tensors"]["layers.0.mlp.experts.records"]
        errors[format] = max(record["relative_error"].values())
    assert errors["int4"] > 5 * errors["int8"] > 0 and errors["bf16"] == 0  # it was bfloat16


def test_a_warning_when_routing_changes(mixtral, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("manyhands.quantize.receipt.ASKED_AGREEMENT", 1.01)
    printed = run(capsys, "quantize", mixtral, tmp_path / "packed")
    assert "WARNING: the packed model chooses" in printed.err and "WARNING" not in printed.out
    assert "routing: " in printed.out and "perplexity" not in printed.out


def test_mistakes_are_one_line(mixtral, tmp_path, capsys):
    target = tmp_path / "packed"
    with pytest.raises(ConfigError, match="group_size = 16"):
        run(capsys, "quantize", mixtral, target, "--group-size", 16)
    with pytest.raises(CheckpointError, match="does not exist"):
        run(capsys, "quantize", tmp_path / "nowhere", target)
    with pytest.raises(DataError, match="no such file"):
        run(capsys, "quantize", mixtral, target, "--data", tmp_path / "nowhere.txt")
    run(capsys, "quantize", mixtral, target)
    with pytest.raises(UserError, match="packed already"):
        run(capsys, "quantize", target, tmp_path / "twice")
    shutil.rmtree(target)
    with pytest.raises(CheckpointError):
        load_model(target)


@pytest.mark.parametrize(
    ("linear", "experts", "said"),
    [
        ("int8", "int4", "--experts int8, then --linear bf16"),
        ("int8", "int8", "--linear bf16, then --experts bf16"),
        ("int4", "int4", "--linear int8, then --experts int8"),
        ("bf16", "int8", "--experts bf16"),
        ("bf16", "bf16", "Nothing is rounded"),
    ],
)
def test_the_advice_is_never_what_is_in_use(linear: str, experts: str, said: str) -> None:
    assert said in advice(linear, experts)
    assert f"--linear {linear}" not in advice(linear, experts) and f"--experts {experts}" not in advice(linear, experts)


def test_what_is_no_decoder_is_refused_before_any_text_is_read(tmp_path) -> None:
    model = Recurrent(RecurrentConfig(vocab_size=288, hidden_size=16, num_hidden_layers=1, moe=None, moe_after=[]))
    save(model, tmp_path / "recurrent", Tokenizer.train([TEXT], 280))
    with pytest.raises(ConfigError, match=r"^kind = 'recurrent': packing is for decoders only$"):
        app(["quantize", str(tmp_path / "recurrent"), str(tmp_path / "packed")], standalone_mode=False)
    assert not (tmp_path / "packed").exists()
