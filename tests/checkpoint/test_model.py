"""The model of a checkpoint: bit for bit there and back, and every misfit named before anything is allocated."""

import json
import logging

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from manyhands.checkpoint import RunDirectory, building, verify
from manyhands.checkpoint.model import load, load_model, save_model
from manyhands.config import ModelConfig, parse
from manyhands.errors import CheckpointError, ConfigError, StorageError
from manyhands.models import Decoder, init_weights
from manyhands.text import Tokenizer

ROUTER = {"num_experts": 4, "num_experts_per_tok": 2, "bias": True, "noisy": True}
MOE = {"router": ROUTER, "moe_intermediate_size": 8, "n_shared_experts": 1, "shared_expert_gate": True}
MLA = {"kind": "mla", "num_attention_heads": 2, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4}
VALUES = {
    "vocab_size": 300,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "intermediate_size": 24,
    "attention": {"num_attention_heads": 2, "head_dim": 8, "qk_norm": "full", "attention_bias": True},
    "moe": {**MOE, "first_k_dense_replace": 1},
}
BIAS = "layers.1.mlp.router.e_score_correction_bias"
ROUTER_WEIGHT = "layers.1.mlp.router.weight"


def build(**fields):
    model = Decoder(parse(ModelConfig, VALUES | fields))
    init_weights(model, seed=1)
    return model


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "some.json"
    Tokenizer.train(["def f(x):\n    return x\n"], 270).save(path)
    return path


@pytest.fixture
def directory(tmp_path, tokenizer_path):
    """A checkpoint whose bias holds values that bfloat16 would merge."""
    model = build()
    model.layers[1].mlp.router.e_score_correction_bias += torch.tensor([1.0, 1.001, 1.002, -1.0])
    with building(tmp_path / "checkpoint") as new:
        save_model(new, model, tokenizer_path)
    return tmp_path / "checkpoint"


def bits(model):
    return {name: (t.dtype, t.shape, t.contiguous().numpy().tobytes()) for name, t in model.state_dict().items()}


def change(directory, tensors=None, config=None):
    """Rewrite the checkpoint with other tensors or another config, and a manifest that vouches for it."""
    tensors = load_file(directory / "model.safetensors") if tensors is None else tensors
    text = (directory / "config.json").read_text() if config is None else config
    tokenizer = (directory / "tokenizer.json").read_bytes()
    with building(directory, own=True) as new:
        save_file(tensors, new / "model.safetensors")
        (new / "config.json").write_text(text)
        (new / "tokenizer.json").write_bytes(tokenizer)


@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": True}, {"moe": None}, {"attention": MLA}])
def test_weights_return_bit_for_bit(tmp_path, fields):
    model = build(**fields).train()
    state = torch.get_rng_state()
    with building(tmp_path / "a") as new:
        save_model(new, model)
    loaded = load_model(tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), state)
    assert bits(loaded) == bits(model) and loaded.config == model.config
    assert not any(module.training for module in loaded.modules())
    assert all(p.requires_grad and p.is_leaf for p in loaded.parameters())
    ids = torch.arange(7)[None]
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    with building(tmp_path / "b") as new:
        save_model(new, loaded)
    assert verify(tmp_path / "a") == verify(tmp_path / "b")
    assert sorted(path.name for path in new.parent.joinpath("a").iterdir()) == [
        "config.json",
        "manifest.json",
        "model.safetensors",
    ]


def test_what_is_in_the_files(directory, tokenizer_path):
    config = json.loads((directory / "config.json").read_text())
    assert (config["model_type"], config["version"]) == ("manyhands", 1)
    assert parse(ModelConfig, config["model"]) == build().config
    with safe_open(directory / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(build().state_dict()) and BIAS in file.keys()  # noqa: SIM118
    assert (directory / "tokenizer.json").read_bytes() == tokenizer_path.read_bytes()


def test_a_tied_head_is_stored_once(tmp_path):
    with building(tmp_path / "a") as new:
        save_model(new, build(tie_word_embeddings=True))
    assert "lm_head.weight" not in load_file(tmp_path / "a" / "model.safetensors")
    loaded = load_model(tmp_path / "a")
    assert loaded.head_weight is loaded.embed_tokens.weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_dtype_leaves_the_router_exact(directory, dtype):
    model, half = load_model(directory), load_model(directory, dtype=dtype)
    for (name, one), other in zip(model.state_dict().items(), half.state_dict().values(), strict=True):
        if ".router." in name:
            assert torch.equal(one, other) and other.dtype == torch.float32
        else:
            assert torch.equal(one.to(dtype), other) and other.dtype == dtype
    assert half.layers[1].mlp.router.e_score_correction_bias.unique().numel() == 4
    assert half(torch.arange(5)[None]).logits.dtype == dtype


def test_a_bfloat16_model_is_stored_and_loaded_as_it_is(tmp_path):
    model = build().bfloat16()
    with building(tmp_path / "a") as new:
        save_model(new, model)
    loaded = load_model(tmp_path / "a")
    assert {n: t.dtype for n, t in loaded.state_dict().items()} == {n: t.dtype for n, t in model.state_dict().items()}
    assert loaded.norm.weight.dtype == torch.bfloat16


def test_training_a_loaded_model_does_not_write_into_the_file(directory):
    model = load_model(directory).train()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(3.0)
    verify(directory)
    assert not torch.equal(load_model(directory).norm.weight, model.norm.weight)


def test_nan_weights_load(directory):
    tensors = load_file(directory / "model.safetensors")
    tensors["norm.weight"][3] = float("nan")
    change(directory, tensors)
    assert load_model(directory).norm.weight.isnan().tolist() == [i == 3 for i in range(16)]


def test_load_takes_a_run_or_a_checkpoint(tmp_path, directory, tokenizer_path, caplog):
    run = RunDirectory(tmp_path / "run")
    for step in (1, 2, 3):
        model = build()
        model.norm.weight.data.fill_(step)
        with building(run.checkpoint_path(step)) as new:
            save_model(new, model, tokenizer_path)
    weights = run.checkpoint_path(3) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x55")
    with caplog.at_level(logging.CRITICAL):
        model, tokenizer = load(run.path, dtype=torch.bfloat16, experts_implementation="eager")
    assert model.norm.weight.tolist() == [2.0] * 16 and model.norm.weight.dtype == torch.bfloat16
    assert model.layers[1].mlp.experts.implementation == "eager"
    assert tokenizer.decode(tokenizer.encode("return x")) == "return x"
    assert bits(load(directory)[0]) == bits(load_model(directory))


def test_load_wants_a_tokenizer_that_fits(tmp_path, tokenizer_path):
    with building(tmp_path / "none") as new:
        save_model(new, build())
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        load(tmp_path / "none")
    with building(tmp_path / "small") as new:
        save_model(new, build(vocab_size=260), tokenizer_path)
    with pytest.raises(CheckpointError, match="the tokenizer has 270 tokens, the model vocab_size = 260"):
        load(tmp_path / "small")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_damage_is_seen(directory, name):
    data = bytearray((directory / name).read_bytes())
    data[len(data) // 2] ^= 1
    (directory / name).write_bytes(data)
    for loader in (load, load_model):
        with pytest.raises(CheckpointError, match=rf"'{name}': its SHA-256"):
            loader(directory)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_file_the_manifest_does_not_vouch_for_is_not_loaded(directory, name):
    data = (directory / name).read_bytes()
    others = {p.name: p.read_bytes() for p in directory.iterdir() if p.name not in (name, "manifest.json")}
    with building(directory, own=True) as new:
        for other, content in others.items():
            (new / other).write_bytes(content)
    (directory / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=f"its manifest does not list '{name}'"):
        load(directory)


TENSOR_FAULTS = {
    "missing": (lambda t: t.pop(BIAS), rf"tensor '{BIAS}' is missing, which"),
    "several missing": (lambda t: [t.pop(n) for n in (BIAS, "norm.weight")], rf"'{BIAS}' is missing, which"),
    "unknown": (lambda t: t.update(extra=torch.ones(1)), "tensor 'extra' is not one of this model's"),
    "shape": (lambda t: t.update({"norm.weight": torch.ones(17)}), r"'norm\.weight' has shape \[17\].* \[16\]"),
    "transposed": (
        lambda t: t.update({ROUTER_WEIGHT: t[ROUTER_WEIGHT].t().contiguous()}),
        r"router\.weight' has shape \[16, 4\].* \[4, 16\]",
    ),
    "integers": (lambda t: t.update({"norm.weight": torch.ones(16).long()}), r"'norm\.weight' is I64; expected F64"),
    "rounded router": (lambda t: t.update({BIAS: t[BIAS].bfloat16()}), rf"'{BIAS}' is BF16; expected F32$"),
}


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_a_tensor_that_does_not_fit_is_named_before_any_is_read(directory, fault, monkeypatch):
    plant, message = TENSOR_FAULTS[fault]
    tensors = load_file(directory / "model.safetensors")
    plant(tensors)
    change(directory, tensors)
    monkeypatch.setattr("manyhands.checkpoint.own.our_tensor", None)  # reading would be a TypeError
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(directory)
    assert str(directory / "model.safetensors") in str(caught.value)


def config_with(**fields):
    return json.dumps(
        {"model_type": "manyhands", "version": 1, "model": build().config.model_dump(mode="json") | fields}
    )


CONFIG_FAULTS = {
    "{": "not valid JSON",
    "[" * 100_000: "not valid JSON",
    "7" * 5000: "7777…: an integer of 5,000 digits",
    "[]": "expected an object, found list",
    " " * (1 << 20) + "{}": "too long for a description",
    "{}": "'model_type' is missing; known: .*mixtral",
    '{"model_type": "manyhands"}': "model: this field is required",
    '{"model_type": "olmo", "model": {}}': "model_type = 'olmo' is not a family .* did you mean 'olmoe'",
    '{"model_type": "manyhands", "version": 2, "model": {}}': "version = 2",
    '{"model_type": "manyhands", "model": {"hidden_siz": 3}}': "did you mean 'hidden_size'",
    '{"model_type": "manyhands", "model": {"rms_norm_eps": NaN}}': "rms_norm_eps = nan",
    config_with(hidden_size=1 << 24, vocab_size=1 << 24): "has shape .* says",  # a petabyte, never allocated
    config_with(
        hidden_size=1 << 24, moe={"router": {"num_experts": 1 << 16}, "moe_intermediate_size": 1 << 24}
    ): "has shape .* says",
}


@pytest.mark.parametrize("text", CONFIG_FAULTS, ids=range(len(CONFIG_FAULTS)))
def test_a_config_that_cannot_be_is_one_line(directory, text):
    change(directory, config=text)
    with pytest.raises(CheckpointError, match=CONFIG_FAULTS[text]) as caught:
        load_model(directory)
    assert "\n" not in str(caught.value) and str(directory) in str(caught.value)


def test_other_mistakes_keep_their_own_errors(tmp_path, directory):
    with pytest.raises(ConfigError, match="experts_implementation = 'eagre': did you mean 'eager'"):
        load_model(directory, experts_implementation="eagre")
    with pytest.raises(CheckpointError, match="does not exist"):
        load(tmp_path / "nothing")
    with pytest.raises(StorageError, match="cannot write"), building(tmp_path / "x") as new:
        save_model(new, build(), tmp_path / "no_tokenizer.json")
    assert not (tmp_path / "x").exists()
