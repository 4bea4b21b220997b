"""One piece of text and its name."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Document:
    """A text that is kept whole: a file, or a row of a table. The name never holds an absolute path."""

    name: str
    text: str

    @property
    def num_bytes(self) -> int:
        """Length in UTF-8: the bytes of "bits per byte"."""
        return len(self.text.encode("utf-8"))
