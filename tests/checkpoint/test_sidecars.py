"""What lies beside the weights is copied or named; what is exported is read by transformers with its ends."""

import json
import shutil
from pathlib import Path

import pytest

from manyhands.checkpoint.convert import RECEIPT, convert
from manyhands.checkpoint.files import building
from manyhands.checkpoint.model import load, load_model, save, save_model
from manyhands.checkpoint.source import open_source
from manyhands.config import ModelConfig, PackedConfig, Packing
from manyhands.errors import CheckpointError
from manyhands.models import Decoder, init_weights
from manyhands.quantize.quantize import quantize
from manyhands.text import Tokenizer

SHAPE = {
    "vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 64,
    "max_position_embeddings": 32, "attention": {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32},
    "moe": {"router": {"num_experts": 4, "num_experts_per_tok": 2}, "moe_intermediate_size": 64},
}  # fmt: skip
PACKED = PackedConfig(experts=Packing(format="int8"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral of others: no manifest, no tokenizer, no generation_config.json."""
    path = tmp_path_factory.mktemp("plain") / "model"
    model = Decoder(ModelConfig(**SHAPE))
    init_weights(model, seed=1)
    save(model, path, family="mixtral")
    (path / "manifest.json").unlink()
    return path


def copy(plain: Path, target: Path, **fields: object) -> Path:
    shutil.copytree(plain, target)
    values = json.loads((target / "config.json").read_text()) | fields
    (target / "config.json").write_text(json.dumps(values))
    return target


def put(source: Path, target: Path, verb: str) -> dict[str, object]:
    if verb == "quantize":
        return quantize(open_source(source), target, PACKED)
    return convert(source, target, to="manyhands" if verb == "to ours" else None, agreement=False)


@pytest.mark.parametrize("verb", ["convert", "to ours", "quantize"])
def test_files_of_an_unreadable_tokenizer_are_copied(verb: str, plain: Path, tmp_path: Path) -> None:
    source = copy(plain, tmp_path / "source")
    files = {
        "tiktoken.model": b"not ranks", "tokenizer_config.json": b'{"tokenizer_class": "TikTokenTokenizer"}',
        "generation_config.json": b'{"eos_token_id": [5, 6], "temperature": 0.6}', "LICENSE": b"MIT",
        "chat_template.jinja": b"{{ messages }}", "special_tokens_map.json": b"{}", "tokenizer.model": b"\0\1",
    }  # fmt: skip
    left = {"README.md": b"#", "tokenization_kimi.py": b"pass", "pytorch_model.bin": b"x"}
    for name, data in (files | left).items():
        (source / name).write_bytes(data)
    receipt = put(source, tmp_path / "target", verb)
    assert {name: (tmp_path / "target" / name).read_bytes() for name in files} == files
    assert receipt["beside"] == {"copied": sorted(files), "left": sorted(left)}
    assert "not read: " in str(receipt["notes"]) and "left behind: README.md" in str(receipt["notes"])
    assert json.loads((tmp_path / "target" / RECEIPT).read_text()) == receipt


def test_saving_copies_them_too(plain: Path, tmp_path: Path) -> None:
    source = copy(plain, tmp_path / "source")
    (source / "tokenizer.model").write_bytes(b"pieces")
    load_model(source).save(tmp_path / "target")
    assert (tmp_path / "target" / "tokenizer.model").read_bytes() == b"pieces"


@pytest.mark.parametrize("ends", [7, [7, 8, 9]])
@pytest.mark.parametrize("nested", [False, True])
def test_ends_in_config_json(ends: object, nested: bool, plain: Path, tmp_path: Path) -> None:
    source = copy(plain, tmp_path / "source", eos_token_id=ends)
    Tokenizer.train(["some text"], 280).save(source / "tokenizer.json")
    expected = set(ends) if isinstance(ends, list) else {ends}
    if nested:
        (source / "config.json").write_text(json.dumps({"text_config": {"eos_token_id": ends}}))
        assert Tokenizer.from_directory(source).eos_token_ids >= expected
        return
    assert load(source)[1].eos_token_ids >= expected
    convert(source, tmp_path / "ours", to="manyhands", agreement=False)
    assert load(tmp_path / "ours")[1].eos_token_ids >= expected
    convert(tmp_path / "ours", tmp_path / "back", to="mixtral", agreement=False)
    assert load(tmp_path / "back")[1].eos_token_ids >= expected
    assert json.loads((tmp_path / "back" / "config.json").read_text())["eos_token_id"] == ends
    (source / "generation_config.json").write_text('{"eos_token_id": 11}')
    assert Tokenizer.from_directory(source).eos_token_ids == {0, 11}, "generation_config.json goes before config.json"


@pytest.mark.parametrize("projection", ["gate_up_proj", "down_proj"])
def test_weights_that_are_not_finite_are_named(projection: str, tmp_path: Path) -> None:
    model = Decoder(ModelConfig(**SHAPE))
    init_weights(model, seed=1)
    model.state_dict()[f"layers.0.mlp.experts.{projection}"][2, 3, 4] = float("nan")
    save(model, tmp_path / "model", family="mixtral")
    with pytest.raises(CheckpointError, match=rf"experts\.{projection}: int8 cannot hold weights that are not finite"):
        quantize(open_source(tmp_path / "model"), tmp_path / "packed", PACKED)


@pytest.mark.parametrize("verb", ["save", "convert"])
def test_transformers_knows_the_end(verb: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    model = Decoder(ModelConfig(**SHAPE))
    init_weights(model, seed=1)
    template: str | None = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer = Tokenizer.train(["some text"], 280)
    if verb == "convert":  # a run's checkpoint: tokenizer.json alone
        tokenizer.save(tmp_path / "tokenizer.json")
        with building(tmp_path / "ours") as new:
            save_model(new, model, tmp_path / "tokenizer.json")
        convert(tmp_path / "ours", tmp_path / "theirs", to="mixtral", agreement=False)
        template = None
    else:
        assert template is not None
        save(model, tmp_path / "theirs", tokenizer.with_chat_template(template), family="mixtral")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "theirs")
    assert (theirs.eos_token, theirs.eos_token_id, theirs.chat_template) == ("<|endoftext|>", 0, template)
    assert GenerationConfig.from_pretrained(tmp_path / "theirs").eos_token_id == 0


@pytest.mark.parametrize("classes", ["experts", "linear"])
@pytest.mark.parametrize(("written", "read"), [(32, 64), (64, 32)])
@pytest.mark.parametrize("old", [False, True])
def test_records_of_another_group_size_are_refused(
    classes: str, written: int, read: int, old: bool, plain: Path, tmp_path: Path
) -> None:
    """Small records of 32 and of 64 are equally long, since a record is whole pages; old files do not say which."""
    packed = PackedConfig(**{classes: Packing(format="int4", group_size=written)})
    quantize(open_source(plain), tmp_path / "packed", packed)
    if old:
        weights = tmp_path / "packed" / "model.safetensors"
        data = weights.read_bytes()
        assert data.count(b"manyhands.packed") == 1
        weights.write_bytes(data.replace(b"manyhands.packed", b"something.packed"))
    open_source(tmp_path / "packed")
    path = tmp_path / "packed" / "config.json"
    path.write_text(path.read_text().replace(f'"group_size": {written}', f'"group_size": {read}'))
    said = (
        rf"int4 in groups of {read}, as config\.json says, has none"
        if old
        else rf"{classes} are packed as int4 in groups of {written}; config\.json says int4 in groups of {read}"
    )
    with pytest.raises(CheckpointError, match=said):
        open_source(tmp_path / "packed")
