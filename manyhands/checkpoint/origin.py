"""What a model remembers of the checkpoint it came from, and whether that is still there.

A model keeps no file open. What it does not compute with (an MTP module, a vision tower, a licence) stays where it is:
whoever saves the model reads it again (`source.reopen`), and hears if it has gone or was changed.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manyhands.checkpoint.packed import Record
from manyhands.checkpoint.tensors import TensorSource
from manyhands.config import PackedConfig
from manyhands.families import Family
from manyhands.families.base import Json


@dataclass(frozen=True, slots=True)
class Origin:
    """What a model remembers of the checkpoint it came from: words and numbers, no open file."""

    directory: Path
    path: Path
    """What was opened: that directory, or a file in it."""
    family: Family
    values: Json
    """`config.json` as it stands."""
    kept: tuple[str, ...]
    """Logical tensors that the model does not compute with and a round trip keeps."""
    dtypes: Mapping[str, str]
    """Of the logical tensors."""
    main_dtype: str
    """The embedding's, which nobody keeps apart."""
    packed: PackedConfig | None
    records: Mapping[str, Record]
    ignored: tuple[str, ...]
    open_files: Callable[[], TensorSource]
    """Opens its tensors again."""
    stamps: Mapping[str, tuple[int, int] | None]
    """File -> size and time of its last change, ns; None: it was not there."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Origin":
        """Itself: nothing in it changes."""
        return self

    def lost(self) -> str | None:
        """What of it is no longer there as it was, in words; None if all of it is."""
        for file, then in self.stamps.items():
            if then is not None and (now := stamp(self.directory / file)) != then:
                return f"{self.directory / file}: {'is gone' if now is None else 'was changed'} since it was loaded"
        return None


def stamp(path: Path) -> tuple[int, int] | None:
    """Size of a file and time of its last change, ns; None if it cannot be looked at."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns
