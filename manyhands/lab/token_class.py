"""What a token of Python source is, by its spelling alone: enough to see whether experts know a class from another."""

import keyword
from collections.abc import Callable

from manyhands.text import Tokenizer

_TESTS: dict[str, Callable[[str], bool]] = {
    "white space": lambda text: not text.strip(),
    "keyword": lambda text: keyword.iskeyword(text.strip()),
    "name": lambda text: text.strip().isidentifier(),
    "number": lambda text: text.strip().isdecimal(),
    "signs": lambda text: not any(c.isalnum() or c == "_" for c in text),
}
CLASSES = (*_TESTS, "mixed")
"""In the order in which they are asked; `mixed` is what no test takes, parts of a character for instance."""


def token_class(spelling: bytes) -> int:
    """The class of one token, as an index into `CLASSES`."""
    text = spelling.decode(errors="replace")
    return next((i for i, test in enumerate(_TESTS.values()) if "\ufffd" not in text and test(text)), len(_TESTS))


def token_classes(tokenizer: Tokenizer) -> list[int]:
    """That of every token id."""
    return [token_class(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)]
