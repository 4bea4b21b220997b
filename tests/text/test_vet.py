"""A tokenizer.json from anywhere: one line, in bounded time and memory."""

import copy
import json
import time

import pytest

from manyhands.errors import CheckpointError
from manyhands.text import Tokenizer
from manyhands.text.pieces import PIECES
from manyhands.text.vet import vet

BASE = json.loads(Tokenizer.train(["hello world " * 50], 260).inner.to_str())


def replace(pattern, content, kind="String"):
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def chain(*steps):
    return {"type": "Sequence", "normalizers": list(steps)}


def split(pattern):
    return {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}}


def special(item, count):
    token = {"id": "X", "ids": [0] * count, "tokens": ["X"] * count}
    single = [*[{"SpecialToken": {"id": "X", "type_id": 0}}] * item, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]
    return {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": single,
            "pair": pair,
            "special_tokens": {"X": token},
        }
    }


HOSTILE = {
    "a chain that doubles": ({"normalizer": chain(*[replace("a", "aa")] * 40)}, "makes more than"),
    "a chain through letters": (
        {"normalizer": chain(*[replace(chr(97 + i), chr(98 + i) * 3) for i in range(20)])},
        "makes more than",
    ),
    "a pattern that grows": ({"normalizer": chain(*[replace(".", "xx", "Regex")] * 30)}, "makes more than"),
    "an empty match that grows": ({"normalizer": chain(*[replace("x*", "yy", "Regex")] * 30)}, "makes more than"),
    "nested chains": ({"normalizer": chain(*[chain(replace("a", "aaaa"))] * 9)}, "makes more than"),
    "long content": ({"normalizer": replace("a", "a" * 10**6)}, "characters long"),
    "a decoder that grows": ({"decoder": {"type": "Sequence", "decoders": [replace("a", "aa")] * 40}}, "makes more"),
    "many steps": ({"normalizer": chain(*[{"type": "NFC"}] * 5000)}, "steps"),
    "a catastrophic pattern": (split("(a+)+$"), "a pattern needs too long"),
    "a catastrophic choice": (split("^(a|a|aa)+$"), "a pattern needs too long"),
    "a catastrophic replacement": ({"normalizer": replace("(.*)*x", "y", "Regex")}, "a pattern needs too long"),
    "a long pattern": (split("a" * 20_000), "characters long"),
    "many ids around": (special(200, 1000), "post_processor adds"),
    "a huge id": ({"model": {**BASE["model"], "vocab": {**BASE["model"]["vocab"], "zz": 1 << 31}}}, "token id"),
    "a charsmap": ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA" * 3_000_000}}, "charsmap"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_one_line(tmp_path, name):
    change, said = HOSTILE[name]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({**BASE, **change}))
    begin = time.monotonic()
    with pytest.raises(CheckpointError, match=said) as caught:
        Tokenizer.from_file(path)
    assert time.monotonic() - begin < 60 and "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_padding_without_bound_is_not_done(tmp_path):
    padding = {"strategy": {"Fixed": 10**10}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({**BASE, "padding": {**padding, "pad_type_id": 0, "pad_token": "x"}}))
    assert Tokenizer.from_file(path).decode(Tokenizer.from_file(path).encode("hello")) == "hello"


def test_a_key_that_stands_twice():
    with pytest.raises(ValueError, match="twice"):
        vet(b'{"normalizer": null, "normalizer": null}')


HONEST = [
    {"normalizer": chain({"type": "Prepend", "prepend": "▁"}, replace(" ", "▁"))},
    {"normalizer": chain(replace("``", '"'), replace("''", '"'), {"type": "NFKD"}, replace(" {2,}", " ", "Regex"))},
    {"normalizer": chain(*[replace(c, f"{c} ", "String") for c in "abcdefghijklmnopqrstuvwxyz0123456789"])},
    split(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"),
    split(r"\d{1,3}(?=(?:\d{3})*\b)"),
    split(PIECES),
    special(2, 1),
]


@pytest.mark.parametrize("change", HONEST)
def test_published_kinds_are_taken(change):
    vet(json.dumps({**copy.deepcopy(BASE), **change}).encode())
