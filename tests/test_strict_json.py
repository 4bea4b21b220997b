"""One strict reader of JSON, and everything that reads a description from a file goes through it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from manyhands import strict_json
from manyhands.checkpoint.manifest import MANIFEST, read_manifest
from manyhands.checkpoint.tensor_files import read_json
from manyhands.errors import ManyhandsError, UserError
from manyhands.plan import subject
from manyhands.text.token_file import TokenFile
from manyhands.text.tokenizer_files import read_tokenizer_files
from manyhands.text.vet import vet

BAD = {
    "a key twice": ('{"a": 1, "a": 2}', "'a' stands twice"),
    "a key twice, deep": ('{"b": [{"a": 1, "a": 1}]}', "'a' stands twice"),
    "a key twice, escaped": ('{"a": 1, "\\u0061": 2}', "'a' stands twice"),
    "NaN": ('{"a": NaN}', "a = nan: expected a finite number"),
    "infinity": ('{"a": [-Infinity]}', "a = -inf: expected a finite number"),
    "an overflow": ('{"a": 1e999}', "a = inf: expected a finite number"),
    "an endless integer": ('{"a": ' + "9" * 5000 + "}", "a = 9999999999999999…: an integer of 5,000 digits"),
    "deep lists": ('{"a": ' + "[" * 200_000, "nested too deeply"),
    "deep objects": ('{"a": ' * 50_000, "nested too deeply"),
    "half of it": ('{"a": ', "line 1 column 7"),
    "two of them": ("{} {}", "Extra data"),
    "NaN alone": ("NaN", "nan: expected a finite number"),
    "NaN in lists": ('{"b": 0, "a": [[1], [NaN]], "c": {}}', "a = nan: expected a finite number"),
    "nothing": ("", "not valid JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused_in_one_line(name: str) -> None:
    text, words = BAD[name]
    for data in (text, text.encode()):
        with pytest.raises(ValueError, match=words) as caught:
            strict_json.loads(data)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_what_is_json_is_read() -> None:
    value = {"a": [1, -2.5, 1e308, True, None, "é"], "seed": 2**127, "b": {"a": {}}}
    assert strict_json.loads(json.dumps(value)) == value
    assert strict_json.loads(json.dumps(value, ensure_ascii=False).encode()) == value
    with pytest.raises(ValueError, match="not UTF-8 at byte 1"):
        strict_json.loads(b'"\xff"')


def test_a_file_is_bounded(tmp_path: Path) -> None:
    (tmp_path / "x").write_text('{"a": 1}   ')
    assert strict_json.read_object(tmp_path / "x", 11, UserError) == {"a": 1}
    for limit, path, words in ((10, "x", "more than 10 bytes"), (10, "y", "No such file"), (10, ".", "cannot be read")):
        with pytest.raises(UserError, match=words):
            strict_json.read_object(tmp_path / path, limit, UserError)
    (tmp_path / "x").write_text("[1]")
    with pytest.raises(UserError, match="expected an object, found list"):
        strict_json.read_object(tmp_path / "x", 10, UserError)


def tokens(path: Path) -> None:
    np.save(path.with_suffix(""), np.zeros(3, np.uint16))
    TokenFile.open(path.with_suffix(""), 10)


READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "manifest": (MANIFEST, lambda path: read_manifest(path.parent)),
    "config.json": ("config.json", lambda path: read_json(path, 1 << 20)),
    "plan": ("config.json", subject.read_json),
    "tokenizer_config.json": ("tokenizer_config.json", lambda path: read_tokenizer_files(path.parent)),
    "tokens": ("t.npy.json", tokens),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", BAD)
def test_everything_that_reads_a_description_is_as_strict(reader: str, name: str, tmp_path: Path) -> None:
    file, read = READERS[reader]
    (tmp_path / "tokenizer.json").write_text("{}")
    text, words = BAD[name]
    (tmp_path / file).write_text(text)
    with pytest.raises(ManyhandsError, match=words) as caught:
        read(tmp_path / file)
    assert "\n" not in str(caught.value) and file in str(caught.value)


@pytest.mark.parametrize("name", BAD)
def test_a_tokenizer_is_as_strict(name: str) -> None:
    text, words = BAD[name]
    with pytest.raises(ValueError, match=words):
        vet(text.encode())
