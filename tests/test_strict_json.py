"""One strict reader of JSON, and everything that reads a description from a file goes through it."""

import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from manyhands import strict_json
from manyhands.checkpoint.descriptions import read_json
from manyhands.checkpoint.manifest import MANIFEST, read_manifest
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


def test_the_first_of_a_text() -> None:
    assert strict_json.first('{"a": [1]}; {"b": 2}') == ({"a": [1]}, '; {"b": 2}')
    for text in ('{"a": 1, "a": 2} x', "NaN", "[" * 100_000, "x", ""):
        with pytest.raises(ValueError):
            strict_json.first(text)


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


@pytest.mark.parametrize("number", ["1" + "0" * 400 + ".0", "1e0309", "2E+308", "9" * 300 + "e99", "1" * 65, "-1e9999"])
def test_no_way_of_writing_an_endless_number_is_missed(number: str) -> None:
    with pytest.raises(ValueError, match="a = "):
        strict_json.loads('{"a": ' + number + "}")


@pytest.mark.parametrize("number", ["1e308", "1E-400", "0.1", "-0.0", "1" * 64, "1" + "0" * 300 + ".5", "1.5e007"])
def test_numbers_are_read_as_python_reads_them(number: str) -> None:
    assert repr(strict_json.loads(f"[{number}]")) == repr(json.loads(f"[{number}]"))


EXCEPTIONS = {
    "strict_json.py": "the reader itself",
    "text/chat_worker.py": "our own words through a pipe, in a process that imports nothing it can do without",
    "text/pattern_worker.py": "the same",
    "text/formats.py": "rows of somebody's corpus: one field is taken, what else stands there is not ours to judge",
    "trace/journal.py": "our own lines, written without NaN, and read by the hundred thousand",
    "train/state.py": "our own file, checked by its digest; the guard's last values may be infinite",
    "train/budget.py": "the same file",
}
"""Modules that read JSON with Python's own reader, and why."""
YAML = "config/strict_yaml.py"


def readers(source: str) -> set[str]:
    """How `source` reads JSON or YAML by itself: `json`, `yaml`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        else:
            continue
        for name in names:
            if name in ("json.load", "json.loads", "json.JSONDecoder") or name.endswith(".model_validate_json"):
                found.add("json")
            if name.startswith("yaml.") and ("load" in name.lower() or name == "yaml.compose"):
                found.add("yaml")
    return found


def test_nothing_else_reads_json_or_yaml() -> None:
    package = Path(strict_json.__file__).parent
    found = {path.relative_to(package).as_posix(): readers(path.read_text("utf-8")) for path in package.rglob("*.py")}
    assert {name for name, kinds in found.items() if "json" in kinds} == set(EXCEPTIONS)
    assert {name for name, kinds in found.items() if "yaml" in kinds} == {YAML}


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("json.loads(text)", "json"),
        ("from json import load", "json"),
        ("Config.model_validate_json(text)", "json"),
        ("yaml.safe_load(text)", "yaml"),
        ("from yaml import load", "yaml"),
        ("class L(yaml.SafeLoader): pass", "yaml"),
    ],
)
def test_the_scan_sees(source: str, kind: str) -> None:
    assert readers(source) == {kind}
    assert not readers("strict_json.loads(text)\nread_yaml(text)\njson.dumps(1)\nyaml.safe_dump(1)")
