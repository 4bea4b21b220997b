"""A trace on disk: who went where, token by token, with the step in which tokens shared a forward pass.

    DIR/trace.json                what it is of (`Manifest`); there before the first part
    DIR/part-00000.safetensors    successive tokens (`Part`), at most 64 MiB; each appears whole, in one rename
    DIR/part-00001.safetensors    …
    DIR/manifest.json             size and SHA-256 of every file, when the recording has ended

    T tokens   L sparse layers   K experts per token

A recording that was killed lacks `manifest.json`, and its finished parts are read as far as they go. `Recorder`
(recorder.py) writes; nothing here needs a model.
"""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from manyhands.checkpoint.manifest import MANIFEST, read_manifest
from manyhands.config import parse
from manyhands.errors import CheckpointError, ConfigError, DataError
from manyhands.files import within
from manyhands.strict_json import parse_object, read_object
from manyhands.trace.part import DESCRIPTION, MOST_PART_BYTES, Manifest, Part, Phase, cat, check_part, part_name
from manyhands.trace.recorder import Recorder

__all__ = ["Manifest", "Part", "Phase", "Recorder", "Trace"]

_MOST_HEADER = 1 << 16
_MOST_DESCRIPTION = 1 << 20
_MOST_STEP_BYTES = 1 << 30
_PART = re.compile(r"part-(\d{5,9})\.safetensors")


class Trace:
    """A recorded trace, opened: what it is of has been read, and how many tokens each part has; no array yet."""

    def __init__(self, path: Path, manifest: Manifest, parts: list[tuple[Path, int]], complete: bool) -> None:
        """By `open`."""
        self.path, self.manifest, self._parts = path, manifest, parts
        self.complete = complete
        """Whether the recording ended; False: it was killed, or goes on, and more parts may come."""

    @classmethod
    def open(cls, path: str | Path) -> "Trace":
        """The trace in a directory.

        Raises `DataError`, naming the file and what is wrong, for a directory that holds none, and for parts that are
        missing, truncated or not regular files.
        """
        path = Path(path)
        if not path.is_dir() or not (path / DESCRIPTION).is_file():
            what = "a directory without" if path.is_dir() else "not a directory with"
            raise DataError(
                f"{path}: {what} a {DESCRIPTION}; expected a trace that --trace DIR or `trace import` wrote"
            )
        _check_regular(path / DESCRIPTION)
        values = read_object(path / DESCRIPTION, _MOST_DESCRIPTION, DataError)
        try:
            manifest = parse(Manifest, values, str(path / DESCRIPTION))
        except ConfigError as error:
            raise DataError(str(error)) from None
        by_number = {int(match[1]): entry.name for entry in path.iterdir() if (match := _PART.fullmatch(entry.name))}
        numbers = sorted(by_number)
        found = [by_number[number] for number in numbers]
        if numbers and numbers != list(range(numbers[0], numbers[0] + len(numbers))):
            lacking = next(number + 1 for number in numbers if number + 1 not in by_number)
            raise DataError(f"{path}: {part_name(lacking)} is missing between {found[0]} and {found[-1]}")
        complete = (path / MANIFEST).is_file()
        if complete:
            _check_listed(path, found)
        return cls(path, manifest, [(path / name, _tokens(path / name)) for name in found], complete)

    def __len__(self) -> int:
        """Tokens."""
        return sum(T for _, T in self._parts)

    def parts(self) -> Iterator[Part]:
        """The parts in order, each read, and checked against the manifest, when its turn comes.

        One of them is in memory at a time (64 MiB at most), unless the caller keeps more. Raises `DataError`, naming
        file, array and place, for what is not as the manifest says, and where `step` falls from part to part.
        """
        last = 0
        for path, _ in self._parts:
            part = self._read(path)
            if len(part):
                if int(part.step[0]) < last:
                    raise DataError(f"{path}: begins with step {part.step[0]}, the part before ends with {last}")
                last = int(part.step[-1])
                yield part

    def steps(self) -> Iterator[Part]:
        """The tokens of each forward pass, in order, across the borders of parts. Raises what `whole` does."""
        for part in self.whole():
            borders = [0, *_borders(part), len(part)]
            for first, end in itertools.pairwise(borders):
                yield part.rows(slice(first, end))

    def whole(self) -> Iterator[Part]:
        """The same tokens as `parts`, cut so that no forward pass is in two of them.

        Raises `DataError` as `parts` does, and for a pass of more than 1 GiB.
        """
        most = _MOST_STEP_BYTES // self.manifest.token_bytes()
        waiting: list[Part] = []
        """The last pass so far."""
        for part in self.parts():
            if waiting and waiting[0].step[0] != part.step[0]:
                yield cat(waiting)
                waiting = []
            last = max(_borders(part), default=0)
            if last:
                yield cat([*waiting, part.rows(slice(last))])
                waiting = []
            waiting.append(part.rows(slice(last, None)))
            if sum(map(len, waiting)) > most:
                raise DataError(f"{self.path}: step {part.step[-1]} has more than {most:,} tokens")
        if waiting:
            yield cat(waiting)

    def _read(self, path: Path) -> Part:
        """Read, not mapped: a file that is cut meanwhile is then an error and not a signal."""
        _check_regular(path)
        try:
            with open(path, "rb") as file:
                data = file.read(MOST_PART_BYTES + _MOST_HEADER + 1)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None
        _header(data[: 8 + _MOST_HEADER], len(data), path)
        try:
            arrays = safetensors.numpy.load(data)
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise DataError(f"{path}: not a part of a trace, or truncated: {error}") from None
        return check_part(arrays, self.manifest, str(path))


def _borders(part: Part) -> list[int]:
    """Where in a part another step begins than the one before."""
    found: list[int] = (np.flatnonzero(np.diff(part.step)) + 1).tolist()
    return found


def _tokens(path: Path) -> int:
    """T of a part, from its header."""
    _check_regular(path)
    try:
        with open(path, "rb") as file:
            size = path.stat().st_size
            header = _header(file.read(8 + _MOST_HEADER), size, path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    entry = header.get("step")
    shape = entry.get("shape") if isinstance(entry, dict) else None
    if not isinstance(shape, list) or len(shape) != 1 or type(shape[0]) is not int or not 0 <= shape[0] * 4 <= size:
        raise DataError(f"{path}: not a part of a trace: its header gives no shape [T] of 'step'")
    return shape[0]


def _header(first: bytes, size: int, path: Path) -> dict[str, object]:
    """The JSON at the beginning of a file of `size` bytes, of which these are the first."""
    length = int.from_bytes(first[:8], "little")
    if size > MOST_PART_BYTES + _MOST_HEADER:
        raise DataError(f"{path}: {size:,} bytes; a part of a trace has at most {MOST_PART_BYTES:,}")
    if len(first) < 8 or length > min(_MOST_HEADER, size - 8):
        raise DataError(f"{path}: not a part of a trace, or truncated: {size:,} bytes, a header of {length:,}")
    return parse_object(first[8 : 8 + length], f"{path}: the header", DataError)


def _check_regular(path: Path) -> None:
    if not path.is_file() or not within(path):
        raise DataError(f"{path}: not a regular file in its directory")


def _check_listed(path: Path, found: list[str]) -> None:
    """The files are those that `manifest.json` lists, of the sizes it gives. Hashes: `checkpoint.verify`."""
    try:
        listed = read_manifest(path).files
    except CheckpointError as error:
        raise DataError(str(error)) from None
    if names := {name for name in listed if _PART.fullmatch(name)} ^ set(found):
        name = min(names)
        raise DataError(f"{path}: {name} is {'missing' if name in listed else f'not in its {MANIFEST}'}")
    for name in found:
        _check_regular(path / name)
        if (size := (path / name).stat().st_size) != listed[name].size:
            raise DataError(f"{path / name}: {size:,} bytes where {MANIFEST} says {listed[name].size:,}; truncated?")
