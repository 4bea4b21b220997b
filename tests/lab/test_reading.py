"""Word classes of Python, by character."""

from pathlib import Path

import pytest

from manyhands.errors import DataError
from manyhands.lab.job import Job
from manyhands.lab.reading import CLASSES, check_data, python_words


def test_each_token_has_its_class_at_its_place() -> None:
    text = 'def area(r):\n    # of a circle\n    return math.pi * pow(r, 2) if r else "ä"\n'
    found = [(text[a:b], CLASSES[kind]) for a, b, kind in python_words(text)]
    assert found == [
        ("def", "keyword"), ("area", "definition"), ("(", "bracket"), ("r", "name"), (")", "bracket"),
        (":", "separator"), ("# of a circle", "comment"), ("return", "keyword"), ("math", "name"), (".", "separator"),
        ("pi", "attribute"), ("*", "operator"), ("pow", "call"), ("(", "bracket"), ("r", "name"), (",", "separator"),
        ("2", "number"), (")", "bracket"), ("if", "keyword"), ("r", "name"), ("else", "keyword"), ('"ä"', "string"),
    ]  # fmt: skip


def test_what_is_no_python_has_none() -> None:
    assert python_words("f(") == ()


def test_data_are_read_before_anything_is_trained(tmp_path: Path) -> None:
    text, treebank, none = tmp_path / "a.txt", tmp_path / "a.conllu", tmp_path / "b.conllu"
    text.write_text("some words\n")
    treebank.write_text("\t".join(["1", "Hands", "hand", "NOUN", *"______"]) + "\n\n")
    none.write_text("no treebank\n")
    for name, tagged, says in (
        (text, True, "a.txt: no treebank"),
        (none, True, "b.conllu: line 1 has 1 fields"),
        (none, False, "b.conllu: line 1 has 1 fields"),
        (tmp_path / "c.txt", False, "c.txt"),
    ):
        with pytest.raises(DataError, match=says):
            check_data(Job(True, (0,), tmp_path, name), tagged=tagged)
    check_data(Job(True, (0,), tmp_path, treebank), tagged=True)
    check_data(Job(True, (0,), tmp_path, text))
