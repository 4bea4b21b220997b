"""Tokens of Python source have the class that their spelling says."""

import pytest

from manyhands.lab.token_class import CLASSES, token_class, token_classes
from manyhands.text import Tokenizer


@pytest.mark.parametrize(
    ("spelling", "expected"),
    [
        (b"\n    ", "white space"),
        (b" return", "keyword"),
        (b"None", "keyword"),
        (b" returns", "name"),
        (b"_x1", "name"),
        (b" 42", "number"),
        (b"):\n", "signs"),
        (b" ==", "signs"),
        (b"(self", "mixed"),
        ("é".encode()[:1], "mixed"),
        (b"", "white space"),
    ],
)
def test_a_class_is_told_by_the_spelling(spelling: bytes, expected: str) -> None:
    assert CLASSES[token_class(spelling)] == expected


def test_every_token_of_a_vocabulary_has_one() -> None:
    tokenizer = Tokenizer.train(["def f(x):\n    return x + 1\n"] * 20, 280)
    classes = token_classes(tokenizer)
    assert len(classes) == tokenizer.vocab_size
    assert classes[tokenizer.encode("+")[0]] == CLASSES.index("signs")
