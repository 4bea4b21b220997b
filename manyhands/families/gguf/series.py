"""A model in GGUF: one file, or the series `NAME-00001-of-0000N.gguf`."""

import re
from pathlib import Path

from manyhands.config.base import short_repr
from manyhands.errors import CheckpointError
from manyhands.families.gguf.header import GgufHeader, TensorInfo, read_gguf_header

_SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_MOST_FILES = 1000


def read_series(path: Path) -> tuple[GgufHeader, list[GgufHeader]]:
    """The header of `path` with the tensors of all files of its series, and each file's own."""
    first = read_gguf_header(path)
    count, number = (first.metadata.get(f"split.{key}", usual) for key, usual in (("count", 1), ("no", 0)))
    if type(count) is not int or type(number) is not int or not 0 <= number < max(count, 1) <= _MOST_FILES:
        raise CheckpointError(
            f"{path}: split.no = {short_repr(number)} of split.count = {short_repr(count)} makes no sense"
        )
    if count <= 1:
        return first, [first]
    match = _SPLIT.fullmatch(path.name)
    if match is None or (int(match["number"]), int(match["count"])) != (number + 1, count):
        expected = f"…-{number + 1:05}-of-{count:05}.gguf"
        raise CheckpointError(f"{path}: file {number + 1} of {count}; expected the name {expected}")
    names = [f"{match['stem']}-{n + 1:05}-of-{count:05}.gguf" for n in range(count)]
    if number:
        raise CheckpointError(f"{path}: file {number + 1} of {count}; give the first one, {names[0]}")
    parts = [first]
    for n, name in enumerate(names[1:], 1):
        part = read_gguf_header(path.parent / name)
        if (part.metadata.get("split.no"), part.metadata.get("split.count")) != (n, count):
            raise CheckpointError(f"{part.path}: does not say that it is file {n + 1} of {count}")
        parts.append(part)
    tensors: dict[str, TensorInfo] = {}
    for part in parts:
        tensors |= part.tensors
    total = first.metadata.get("split.tensors.count", len(tensors))
    if total != len(tensors):
        raise CheckpointError(
            f"{path}: split.tensors.count = {short_repr(total)}; the {count} files hold {len(tensors)}"
        )
    return GgufHeader(path, first.metadata, tensors), parts


def is_gguf(path: str | Path) -> bool:
    """Whether `path` names a GGUF file, by its ending."""
    return str(path).endswith(".gguf") and not Path(path).is_dir()


def gguf_in(directory: Path) -> Path | None:
    """The model in GGUF that a directory holds instead of a checkpoint; None if there is none.

    Raises `CheckpointError` if there are several.
    """
    if not directory.is_dir():
        return None
    names = sorted(path.name for path in directory.glob("*.gguf"))
    firsts = [name for name in names if (match := _SPLIT.fullmatch(name)) is None or int(match["number"]) == 1]
    if len(firsts) > 1:
        raise CheckpointError(
            f"{directory}: holds {len(firsts)} models in GGUF; name one of them, as {firsts[0][:80]!r}"
        )
    return directory / firsts[0] if firsts else None
