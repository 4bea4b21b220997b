"""Treebanks: words find their place in the text, and tokens their word."""

from pathlib import Path

import pytest

from manyhands.errors import DataError
from manyhands.inspect.conllu import UPOS, align, read_conllu
from manyhands.inspect.texts import read_sequences, spans
from manyhands.text import Tokenizer


def row(place, form, tag, misc="_") -> str:
    return "\t".join([str(place), form, "_", tag, "_", "_", "_", "_", "_", misc])


TREE = "\n".join(
    [
        *("# newdoc id = a", "# text = I don't know, Zoë.", row(1, "I", "PRON"), row("2-3", "don't", "_")),
        *(row(2, "do", "AUX"), row(3, "n't", "PART"), row(4, "know", "VERB", "SpaceAfter=No"), row(5, ",", "PUNCT")),
        *(row("5.1", "hidden", "VERB"), row(6, "Zoë", "PROPN", "SpaceAfter=No"), row(7, ".", "PUNCT"), ""),
        *("# text = du pain", row("1-2", "du", "_"), row(1, "de", "ADP"), row(2, "le", "DET"), row(3, "pain", "NOUN")),
        *("", "# newdoc id = b", "# newpar", row(1, "Yes", "INTJ", "SpaceAfter=No"), row(2, "!", "PUNCT"), "", ""),
    ]
)


def test_words_have_their_place(tmp_path: Path) -> None:
    (tmp_path / "t.conllu").write_text(TREE, encoding="utf-8")
    first, second = read_conllu(tmp_path / "t.conllu")
    assert first.text == "I don't know, Zoë. du pain" and second.text == "Yes!"
    words = [(first.text[begin:end], UPOS[tag]) for begin, end, tag in first.words]
    # `du` is not spelled by its words, so it has none.
    assert words == [
        *(("I", "PRON"), ("do", "AUX"), ("n't", "PART"), ("know", "VERB"), (",", "PUNCT"), ("Zoë", "PROPN")),
        *((".", "PUNCT"), ("pain", "NOUN")),
    ]
    assert [second.text[begin:end] for begin, end, _ in second.words] == ["Yes", "!"]


def test_tokens_find_their_word_and_no_token_has_two(tmp_path: Path) -> None:
    (tmp_path / "t.conllu").write_text(TREE, encoding="utf-8")
    text = read_conllu(tmp_path / "t.conllu")[0]
    whole = [(0, 1), (1, 4), (4, 7), (1, 7), (7, 10), (18, 19), (19, 21)]
    found = [UPOS[tag] if tag >= 0 else None for tag in align(text, whole)]
    assert found == ["PRON", "AUX", "PART", None, "VERB", None, None]


def test_parts_of_one_character_have_its_word(tmp_path: Path) -> None:
    (tmp_path / "t.conllu").write_text(TREE, encoding="utf-8")
    text = read_conllu(tmp_path / "t.conllu")[0]
    tokenizer = Tokenizer.train(["abc"], 257)  # bytes
    ids = tokenizer.encode(text.text)
    tags = align(text, spans(text.text, ids, tokenizer))
    assert len(tags) == len(text.text.encode())
    propn = [i for i, tag in enumerate(tags) if tag == UPOS.index("PROPN")]
    assert len(propn) == len("Zoë".encode()) == 4


def test_domains_and_texts(tmp_path: Path) -> None:
    (tmp_path / "t.conllu").write_text(TREE, encoding="utf-8")
    (tmp_path / "plain.txt").write_text("many hands make light work " * 60)
    sources = [str(tmp_path / "t.conllu"), str(tmp_path / "plain.txt")]
    tokenizer = Tokenizer.train(["abc"], 257)
    read = read_sequences(sources, tokenizer, 16, 400)
    assert read.domains == ("t", "plain")
    assert (read.domain == 1).sum() == 400 and (read.domain == 0).sum() == len(
        "I don't know, Zoë. du painYes!".encode()
    )
    assert (read.tag[read.domain == 1] == -1).all() and (read.tag[read.domain == 0] >= 0).any()
    assert sorted(set(read.text)) == list(range(read.text.max() + 1))
    for text in set(read.text):
        assert len(set(read.domain[read.text == text])) == 1
    again = read_sequences(sources, tokenizer, 16, 400)
    assert (again.token_ids == read.token_ids).all()
    with pytest.raises(DataError, match="given twice"):
        read_sequences([sources[0], sources[0]], tokenizer, 16, 400)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("1\tHi\n", "line 1 has 2 fields"),
        (row(1, "Hi", "GREETING") + "\n", "line 1: 'GREETING' is not a universal part of speech"),
        (row("x", "Hi", "INTJ") + "\n", "line 1: 'x' is not the number of a word"),
        ("# text = Bye\n" + row(1, "Hi", "INTJ") + "\n", "does not hold its word 'Hi'"),
        ("# only a comment\n", "no word"),
    ],
)
def test_what_is_no_treebank_is_said(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "t.conllu").write_text(text)
    with pytest.raises(DataError, match=complaint):
        read_conllu(tmp_path / "t.conllu")


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "t.conllu").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="not UTF-8"):
        read_conllu(tmp_path / "t.conllu")
    with pytest.raises(DataError, match="cannot be read"):
        read_conllu(tmp_path / "missing.conllu")
