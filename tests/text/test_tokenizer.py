"""The tokenizer: nothing is lost, nothing is special, everybody can read the file."""

import json
import random
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Inner
from tokenizers import decoders, models, processors

from manyhands.errors import CheckpointError, DataError, StorageError
from manyhands.text import Tokenizer, read_documents

TEXTS = [document.text for document in read_documents(["stdlib"]) if document.name.startswith("json/")]
TOKENIZER = Tokenizer.train(TEXTS, vocab_size=1000)
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@settings(max_examples=300, deadline=None)
@given(st.one_of(ANY_TEXT, st.text(" \t\r\n_.(\"'aZ9é\u0301<|>", max_size=60)))
def test_round_trip_is_exact(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert b"".join(TOKENIZER.token_bytes(i) for i in ids) == text.encode()


@pytest.mark.parametrize("text", ["", "\n", " ", "\r\n\t  x", "\0", "नमस्ते", "👩‍👩‍👧", "\ufeff\ufffd", "ﬁ İ ß"])
def test_round_trip_of_awkward_text(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@pytest.mark.parametrize(
    "text", [" " * 200_000, "a" * 200_000, "\n" * 200_000, "(" * 200_000, "a." * 100_000, "( " * 99_999]
)
def test_long_runs_take_no_longer_than_they_should(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_source_code_is_compact() -> None:
    """A line break and its indentation are one token, with the signs before or the word behind if that is frequent."""
    assert len(TOKENIZER.encode("\n        ")) == 1
    tokens = [TOKENIZER.token_bytes(i) for i in range(TOKENIZER.vocab_size)]
    assert sum(re.fullmatch(rb"\n +[a-z]+", token) is not None for token in tokens) > 5
    assert sum(re.fullmatch(rb"[:),]+\n +", token) is not None for token in tokens) > 5
    assert len(TOKENIZER.encode("        ")) <= 2
    assert sum(len(text.encode()) for text in TEXTS) / sum(map(len, TOKENIZER.encode_batch(TEXTS))) > 2.9


def test_sizes_and_end_of_text() -> None:
    assert TOKENIZER.vocab_size == 1000
    assert TOKENIZER.eos_token_id == 0
    assert TOKENIZER.token_bytes(0) == b"<|endoftext|>"
    assert {TOKENIZER.token_bytes(i) for i in range(1000)} >= {bytes([byte]) for byte in range(256)}
    assert TOKENIZER.token_bytes(1000) == TOKENIZER.token_bytes(-1) == b""
    assert Tokenizer.train(["few words"], 4096).vocab_size < 300


def test_training_is_deterministic() -> None:
    assert Tokenizer.train(iter(TEXTS), 1000).inner.to_str() == TOKENIZER.inner.to_str()


def test_special_text_in_a_document_is_only_text() -> None:
    text = "before<|endoftext|>after"
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.eos_token_id not in ids
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.encode_batch([text, "x"]) == [ids, TOKENIZER.encode("x")]


def test_byte_lengths_count_text_only() -> None:
    lengths = TOKENIZER.byte_lengths()
    assert lengths.shape == (1000,) and lengths[0] == 0 and lengths[1:].min() == 1
    text = "naïve = 'ß' # <|endoftext|>\n"
    assert lengths[[*TOKENIZER.encode(text), 0]].sum() == len(text.encode())


def test_misuse_of_training_and_encoding() -> None:
    with pytest.raises(DataError, match="257"):
        Tokenizer.train(TEXTS, 256)
    for use in (lambda text: Tokenizer.train([text], 300), TOKENIZER.encode):
        with pytest.raises(DataError, match="surrogate pair at character 3"):
            use("abc\ud800")


def test_save_and_load(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    TOKENIZER.save(path)
    loaded = Tokenizer.from_file(path)
    text = "".join(TEXTS[:1]) + "<|endoftext|>"
    assert loaded.encode(text) == TOKENIZER.encode(text)
    assert (loaded.vocab_size, loaded.eos_token_id) == (1000, 0)
    assert [entry.name for entry in tmp_path.iterdir()] == ["tokenizer.json"]
    with pytest.raises(StorageError, match="cannot write"):
        TOKENIZER.save(path / "below-a-file" / "tokenizer.json")


@pytest.mark.parametrize("content", [b"", b"{}", b"[1, 2]", b"not json", b"\xff\xfe", b'{"model": {"type": "BPE"}}'])
def test_a_bad_file_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: cannot be read"):
        Tokenizer.from_file(path)
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.from_file(path)
    assert "tokenizer.json: not a tokenizer.json" in str(caught.value) and "\n" not in str(caught.value)


def test_transformers_reads_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    TOKENIZER.save(tmp_path / "tokenizer.json")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for text in (TEXTS[0], "a  b\r\n\tÄ 😀"):
        assert theirs.encode(text, add_special_tokens=False) == TOKENIZER.encode(text)
        assert theirs.decode(TOKENIZER.encode(text), clean_up_tokenization_spaces=False) == text


def sentencepiece_like() -> Inner:
    """Llama-2's kind: U+2581 for a space, `<0x..>` for bytes, and a template that adds `<s>`."""
    vocabulary = {"<s>": 0, "</s>": 1, "\u2581": 2, "a": 3, "<0xC3>": 4, "<0xA9>": 5, "\u2581a": 6, "<0xE9>": 9}
    inner = Inner(models.BPE(vocabulary, [("\u2581", "a")], byte_fallback=True))
    inner.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    inner.add_special_tokens(["<s>", "</s>"])
    inner.enable_truncation(3)
    inner.enable_padding(length=8)
    return inner


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(sentencepiece_like().to_str())
    tokenizer = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert tokenizer.encode("\u2581aéaaa") == [6, 4, 5, 3, 3, 3]  # nothing added, cut or padded
    assert tokenizer.eos_token_id == 1
    assert tokenizer.vocab_size == 10  # ids have gaps: one more than the largest
    assert [tokenizer.token_bytes(i) for i in (6, 4, 5, 3, 8)] == [b" a", b"\xc3", b"\xa9", b"a", b""]
    stream = tokenizer.stream_decoder()
    assert [stream.push(i) for i in (6, 4, 5, 3)] == [" a", "", "é", "a"]
    assert tokenizer.decode([6, 4, 5, 3]) == " aéa"


@pytest.mark.parametrize(
    ("names", "eos"), [(["</s>"], "</s>"), (["<|im_end|>", "<|endoftext|>"], "<|endoftext|>"), (["<x>"], None)]
)
def test_end_of_text_by_other_names(names: list[str], eos: str | None) -> None:
    inner = Inner(models.BPE())
    inner.add_special_tokens(names)
    tokenizer = Tokenizer(inner)
    assert tokenizer.eos_token_id == (None if eos is None else inner.token_to_id(eos))


@settings(max_examples=200, deadline=None)
@given(ANY_TEXT)
def test_streaming_gives_the_text_and_never_half_a_character(text: str) -> None:
    stream = TOKENIZER.stream_decoder()
    pieces = [stream.push(i) for i in TOKENIZER.encode(text)]
    assert "".join(pieces) == text
    assert stream.flush() == ""


def test_streaming_of_broken_bytes_equals_decode() -> None:
    byte_id = {TOKENIZER.token_bytes(i): i for i in range(TOKENIZER.vocab_size)}
    draw = random.Random(0)
    face = [byte_id[bytes([byte])] for byte in "😀".encode()]
    stream = TOKENIZER.stream_decoder()
    assert [stream.push(i) for i in face[:3]] == ["", "", ""]
    assert stream.flush() == "\ufffd"
    for _ in range(300):
        ids = [draw.choice([*face, draw.randrange(TOKENIZER.vocab_size)]) for _ in range(8)]
        stream = TOKENIZER.stream_decoder()
        assert "".join([*(stream.push(i) for i in ids), stream.flush()]) == TOKENIZER.decode(ids)


def test_the_file_is_ordinary_json(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path / "tokenizer.json")
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert content["model"]["type"] == "BPE" and content["decoder"]["type"] == "ByteLevel"
    assert [token["content"] for token in content["added_tokens"]] == ["<|endoftext|>"]
