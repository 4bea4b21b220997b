"""T5 and Switch against transformers, and what is particular about their files."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import manyhands as mh
from manyhands.checkpoint.convert import convert
from manyhands.checkpoint.model import load_model
from manyhands.config import EncoderDecoderConfig, RouterConfig
from manyhands.errors import CheckpointError, ConfigError
from manyhands.families import FAMILIES, export_config, misfit, nearest, read_config
from manyhands.models import EncoderDecoder, init_weights

from .encoder_decoders import CASES, IDS, MASK, OUT, SIZES, Seq2Seq, make, measure

SMALL: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 24, "head_dim": 10, "num_attention_heads": 3, "intermediate_size": 40,
    "num_hidden_layers": 4, "num_decoder_layers": 2,
}  # fmt: skip
ROUTER = RouterConfig(num_experts=5, num_experts_per_tok=1, capacity_tokens=64, capacity_per="sequence")
SWITCH = EncoderDecoderConfig(**SMALL, router=ROUTER, num_sparse_encoder_layers=2, num_sparse_decoder_layers=1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    cache: dict[str, Seq2Seq] = {}

    def get(case: str) -> Seq2Seq:
        if case not in cache:
            cache[case] = make(case, tmp_path_factory.mktemp("seq2seq") / "model")
        return cache[case]

    return get


@pytest.mark.parametrize("case", CASES)
def test_as_transformers(case: str, made: Any, tmp_path: Path) -> None:
    row = measure(case, made(case), tmp_path)
    assert row.logits_std > 0.1
    assert row.prefill < 1e-5 * max(1.0, row.logits_std) and row.decode < 2e-5 * max(1.0, row.logits_std)
    assert row.routing == 1.0 and row.round_trip
    assert row.gradient < 1e-5
    assert (row.router_loss is None) == case.startswith("t5")
    assert row.router_loss is None or row.router_loss < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_a_receipt_names_every_tensor(case: str, made: Any, tmp_path: Path) -> None:
    """Through our own format and back, in shards. The table that nobody looks up in an untied model becomes a copy."""
    source = made(case).directory
    before = load_file(source / "model.safetensors")
    left = {"shared.weight"} if case == "switch_transformers, untied" else set()
    if left:
        with pytest.raises(CheckpointError, match=r"tensor 'shared\.weight' would be left over"):
            convert(source, tmp_path / "ours", to="manyhands")
    first = convert(source, tmp_path / "ours", to="manyhands", drop_extras=True)
    assert {name for name, entry in first["source_tensors"].items() if not entry["became"]} == left
    assert set(first["source_tensors"]) == set(before)
    receipt = convert(tmp_path / "ours", tmp_path / "back", to=case.split(",")[0], max_shard_size=20_000)
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())["weight_map"]
    after = {name: load_file(tmp_path / "back" / file)[name] for name, file in index.items()}
    assert set(receipt["target_tensors"]) == set(after) == set(before) and len(set(index.values())) > 1
    assert all(entry["became"] for entry in receipt["source_tensors"].values())
    for name, tensor in after.items():
        assert torch.equal(tensor, before["encoder.embed_tokens.weight" if name in left else name]), name
    assert receipt["agreement"]["largest_logit_difference"] < 1e-6
    assert load_file(_copied(source, tmp_path / "same") / "model.safetensors").keys() == before.keys()


def _copied(source: Path, target: Path) -> Path:
    convert(source, target)
    return target


def _changed(source: Path, target: Path, tensors: dict[str, torch.Tensor], **fields: Any) -> Path:
    target.mkdir()
    config = json.loads((source / "config.json").read_text()) | fields
    (target / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value != "gone"}))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_an_untied_file_without_tables_of_its_own_has_the_shared_one(made: Any, tmp_path: Path) -> None:
    """transformers makes both anew, at random, from such a file; in ours neither is the other's memory."""
    tensors = load_file(made("switch_transformers, untied").directory / "model.safetensors")
    shared = {name: t for name, t in tensors.items() if "embed_tokens" not in name}
    model = load_model(_changed(made("switch_transformers, untied").directory, tmp_path / "m", shared))
    state = model.state_dict()
    assert torch.equal(state["embed_tokens.weight"], shared["shared.weight"])
    assert torch.equal(state["decoder.embed_tokens.weight"], shared["shared.weight"])
    with torch.no_grad():
        state["embed_tokens.weight"].add_(1.0)
    assert torch.equal(state["decoder.embed_tokens.weight"], shared["shared.weight"])
    model.save(tmp_path / "out")
    assert {n for n in load_file(tmp_path / "out" / "model.safetensors") if "block" not in n and "norm" not in n} == {
        "shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"
    }  # fmt: skip


@pytest.mark.parametrize("case", ["t5", "switch_transformers"])
def test_tables_stored_once_more_must_be_the_shared_one(case: str, made: Any, tmp_path: Path) -> None:
    tensors = load_file(made(case).directory / "model.safetensors")
    copy = tensors | {
        f"{side}.embed_tokens.weight": tensors["shared.weight"].clone() for side in ("encoder", "decoder")
    }
    load_model(_changed(made(case).directory, tmp_path / "same", copy))
    copy["decoder.embed_tokens.weight"][3, 3] += 1.0
    with pytest.raises(CheckpointError, match=r"decoder\.embed_tokens\.weight.* differs from 'shared\.weight'"):
        load_model(_changed(made(case).directory, tmp_path / "other", copy))


def test_t5_1_1_as_older_and_newer_versions_write_it(made: Any, tmp_path: Path) -> None:
    """Before transformers 5: `tie_word_embeddings: false` alone. Since: `true`, and `scale_decoder_outputs: false`."""
    directory = made("t5, gated and untied").directory
    tensors = load_file(directory / "model.safetensors")
    assert json.loads((directory / "config.json").read_text())["tie_word_embeddings"] is True
    old = _changed(directory, tmp_path / "old", tensors, tie_word_embeddings=False, scale_decoder_outputs="gone")
    new, older = load_model(directory), load_model(old)
    assert new.config == older.config and not new.config.tie_word_embeddings
    with torch.no_grad():
        assert torch.equal(new(IDS, OUT, MASK).logits, older(IDS, OUT, MASK).logits)
    without = {name: t for name, t in tensors.items() if name != "lm_head.weight"}  # the embedding, not scaled
    loaded = load_model(_changed(directory, tmp_path / "without", without))
    assert torch.equal(loaded.state_dict()["lm_head.weight"], tensors["shared.weight"])
    older.save(tmp_path / "out")
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said["tie_word_embeddings"] is False and said["scale_decoder_outputs"] is False
    with pytest.raises(CheckpointError, match="scale_decoder_outputs = True"):
        load_model(_changed(directory, tmp_path / "n", tensors, tie_word_embeddings=False, scale_decoder_outputs=True))


SAID = {"model_type": "switch_transformers"} | {k: v for k, v in SIZES.items() if k != "attn_implementation"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dense_act_fn": "gated-gelu"}, "dense_act_fn = 'gated-gelu': this family is supported with 'relu'"),
        ({"router_dtype": "bfloat16"}, "router_dtype = 'bfloat16'"),
        ({"encoder_sparse_step": 3}, "encoder_sparse_step = 3"),
        ({"num_sparse_decoder_layers": -1}, "num_sparse_decoder_layers = -1: 0 or more"),
        ({"num_selected_experts": 2}, "num_selected_experts = 2"),
        ({"expert_capacity": 0}, "capacity_tokens"),
        ({"router_jitter": 0.1}, "unknown field 'router_jitter'"),
        ({"d_kv": None}, "'d_kv' is missing"),
    ],
)
def test_what_nobody_builds_is_refused_by_name(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_config(SAID | {"num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 1} | change, "config.json")


def test_what_is_left_out_means_what_transformers_takes_it_to_mean() -> None:
    transformers = pytest.importorskip("transformers")
    for name in ("T5", "SwitchTransformers"):
        full = getattr(transformers, f"{name}Config")().to_dict()
        _, config = read_config(full, "config.json")
        needed = {"model_type", "vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads"}
        for left_out in full.keys() - needed:
            without = {key: value for key, value in full.items() if key != left_out}
            if left_out == "num_decoder_layers":
                assert read_config(without, "config.json")[1] == config  # as many as the encoder has
            assert read_config(without, "config.json")[1] == config, left_out


def test_switch_asked_for_no_sparse_layer_has_one_and_asked_for_too_many_has_none() -> None:
    """In transformers the step is then the number of layers, and layer 1 is 1 modulo that; or 0, which turns it off."""
    transformers = pytest.importorskip("transformers")
    for layers, asked in ((1, 0), (4, 0), (4, 5), (3, 2)):
        fields = SIZES | {"num_layers": layers, "num_sparse_encoder_layers": asked, "num_experts": 3}
        theirs = transformers.SwitchTransformersConfig(**fields | {"num_sparse_decoder_layers": 1})
        with torch.device("meta"):
            blocks = transformers.SwitchTransformersForConditionalGeneration(theirs).encoder.block
        _, config = read_config(theirs.to_dict(), "config.json")
        assert isinstance(config, EncoderDecoderConfig)
        assert config.sparse_encoder_layers == [i for i, block in enumerate(blocks) if block.is_sparse]
    dense_decoder = SWITCH.model_copy(update={"num_sparse_decoder_layers": 0})
    written = export_config(FAMILIES["switch_transformers"], dense_decoder)
    assert written["num_sparse_decoder_layers"] == 3 and written["decoder_sparse_step"] == 0
    with pytest.raises(ConfigError, match="is a T5"):
        read_config(written | {"num_sparse_encoder_layers": 5, "encoder_sparse_step": 0}, "config.json")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_act": "geglu_tanh"}, "no gated network"),
        ({"extra_encoder_networks": 2}, "extra_encoder_networks = 2 here, 0 there"),
        ({"router": ROUTER.model_copy(update={"capacity_tokens": None})}, "capacity_tokens = None"),
        ({"router": ROUTER.model_copy(update={"num_experts_per_tok": 2})}, "router.num_experts_per_tok = 2 here, 1"),
        ({"router": ROUTER.model_copy(update={"capacity_per": "batch"})}, "router.capacity_per = batch here, sequence"),
        ({"router": ROUTER.model_copy(update={"score": "sigmoid"})}, "router.score = sigmoid here, softmax there"),
    ],
)
def test_what_switch_cannot_say_is_refused(change: dict[str, Any], said: str) -> None:
    problem = misfit(FAMILIES["switch_transformers"], SWITCH.model_copy(update=change))
    assert problem is not None and said in problem


def test_the_nearest_family_of_an_encoder_decoder() -> None:
    assert nearest(SWITCH) is FAMILIES["switch_transformers"]
    assert nearest(EncoderDecoderConfig(**SMALL)) is FAMILIES["t5"]
    assert nearest(EncoderDecoderConfig(**SMALL, hidden_act="swiglu", tie_word_embeddings=False)) is FAMILIES["t5"]
    two = EncoderDecoderConfig(**SMALL, tie_word_embeddings=False, share_embeddings=False)
    assert "share_embeddings = false here" in str(misfit(FAMILIES["t5"], two))
    assert "does not describe" in str(misfit(FAMILIES["mixtral"], SWITCH))
    assert "does not describe" in str(misfit(FAMILIES["t5"], mh.ModelConfig()))


def test_a_model_of_ones_own_goes_to_transformers(tmp_path: Path) -> None:
    """One table for both stacks and a head apart is written as transformers needs it: three tables."""
    transformers = pytest.importorskip("transformers")
    config = SWITCH.model_copy(update={"tie_word_embeddings": False})
    assert export_config(FAMILIES["switch_transformers"], config)["tie_word_embeddings"] is False
    model = EncoderDecoder(config).eval()
    init_weights(model, 0)
    mh.save(model, tmp_path / "m")
    theirs, info = transformers.SwitchTransformersForConditionalGeneration.from_pretrained(
        tmp_path / "m", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert theirs.config.decoder_start_token_id == 0 and theirs.config.pad_token_id == 0
    with torch.no_grad():
        logits = theirs.eval()(input_ids=IDS, attention_mask=MASK, decoder_input_ids=OUT).logits
        ours = model(IDS, OUT, MASK).logits
    assert float((logits - ours).abs().max()) < 1e-5 * max(1.0, float(logits.std()))


def test_with_its_tokenizer(made: Any, tmp_path: Path) -> None:
    """T5's: pieces of a Unigram model, `</s>` behind each text, sentinels from the top downward."""
    transformers = pytest.importorskip("transformers")
    words = [("\u2581" + word, -3.0 - n) for n, word in enumerate(["the", "cat", "sat", "on", "a", "mat"])]
    letters = [(letter, -9.0) for letter in "abcdefghijklmnopqrstuvwxyz.,\u2581"]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    theirs = transformers.T5Tokenizer(vocab=special + words + letters, extra_ids=20)
    shutil.copytree(made("switch_transformers").directory, tmp_path / "m")
    theirs.save_pretrained(tmp_path / "m")
    model, tokenizer = mh.load(tmp_path / "m")
    assert isinstance(model, EncoderDecoder) and tokenizer.vocab_size == len(theirs) < model.config.vocab_size
    text = "the cat sat on <extra_id_0> mat."
    ids = tokenizer.encode(text, add_special_tokens=True, parse_special=True)
    assert ids == theirs(text).input_ids and ids[-1] == 1 and theirs.convert_tokens_to_ids("<extra_id_0>") in ids
    assert tokenizer.front_ids == [] and tokenizer.eos_token_ids == {1}
    model.save(tmp_path / "out")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again(text).input_ids == ids
    assert json.loads((tmp_path / "out" / "config.json").read_text())["pad_token_id"] == 0
