"""What the readers of other engines' traces share: hints, bounded lines, arrays of ids.

T tokens   L sparse layers   K experts per token   E experts
"""

import base64
import binascii
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from manyhands.errors import DataError, UserError
from manyhands.strict_json import loads, parse_object
from manyhands.trace.part import Array, Phase

Block = dict[str, Any]
"""Arguments of `Recorder.add_arrays`."""
MOST_LINE = 64 << 20
MOST_FILE = 1 << 30
"""Of a file that is read whole."""
MOST_PAIRS = 1 << 26
"""Pairs of token and expert, of all layers, that a forward pass may have: they are gathered in memory."""


@dataclass(frozen=True, slots=True)
class Hints:
    """What a person knows of a trace that its format does not say."""

    layers: tuple[int, ...] | None = None
    """The numbers of the sparse layers."""
    num_experts: int | None = None
    num_experts_per_tok: int | None = None
    prompt_tokens: int | None = None
    """The first so many tokens of the text were its prompt, run in one pass; the others one by one."""


@dataclass(frozen=True, slots=True)
class Foreign:
    """Another engine's trace, looked through once."""

    fields: dict[str, Any]
    """Of `Recorder`."""
    blocks: Callable[[], Iterator[Block]]
    """The tokens, pass by pass. Reads the file again."""


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Of a text file, numbered from 1, without line ends; empty ones left out. Raises `DataError`."""
    try:
        with open(path, "rb") as file:
            number = 0
            while line := file.readline(MOST_LINE + 1):
                number += 1
                if len(line) > MOST_LINE:
                    raise DataError(f"{path}, line {number}: longer than {MOST_LINE:,} bytes")
                if text := line.decode("utf-8").strip():
                    yield number, text
    except UnicodeDecodeError:
        raise DataError(f"{path}, line {number}: not UTF-8") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Objects of a JSON Lines file, each with the words that an error about it begins with."""
    for number, line in lines(path):
        where = f"{path}, line {number}"
        yield where, parse_object(line, where, DataError)


def first_line(path: Path) -> str:
    """The first of the file that is not empty; empty if there is none."""
    with open(path, "rb") as file:
        return file.read(1 << 12).decode("utf-8", "replace").lstrip().partition("\n")[0]


def jsonl_keys(path: Path) -> set[str]:
    """Of the first record."""
    return next(({*record} for _, record in records(path)), set())


def integer(value: Any, where: str, name: str, most: int = (1 << 31) - 1) -> int:
    """A number from 0 to `most`, of text or JSON. Raises `DataError`."""
    text = isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 12
    found = int(value) if text else value
    if type(found) is not int or not 0 <= found <= most:
        raise DataError(f"{where}: {name} is {str(value)[:40]!r}, expected a number from 0 to {most:,}")
    return found


def read_whole(path: Path) -> bytes:
    """A file of at most 1 GiB. Raises `DataError`."""
    try:
        with open(path, "rb") as file:
            data = file.read(MOST_FILE + 1)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) > MOST_FILE:
        raise DataError(f"{path}: more than {MOST_FILE:,} bytes")
    return data


def json_of(data: bytes, where: str) -> Any:
    """The value of JSON. Raises `DataError`."""
    try:
        return loads(data)
    except ValueError as error:
        raise DataError(f"{where}: {error}") from None


def from_base64(text: Any, where: str) -> bytes:
    """Decoded. Raises `DataError`."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError, TypeError):
        raise DataError(f"{where}: not base64") from None


def text_fields(arrays: list[tuple[str, Array]], hints: Hints, source: str) -> dict[str, Any]:
    """Fields of a trace of whole texts' ids [T, L, K], each with where it is from. -1 and the largest are no expert.

    Raises `DataError` for arrays that do not go together, and for ids that the hints exclude.
    """
    shapes = {array.shape[1:] for _, array in arrays}
    if len(shapes) != 1:
        raise DataError(f"{arrays[0][0]}: arrays of {' and '.join(str(list(s)) for s in sorted(shapes))} per token")
    ((L, K),) = shapes
    layers = hints.layers or tuple(range(L))
    if len(layers) != L:
        raise UserError(f"{arrays[0][0]}: {L} layers in it, and {len(layers)} were named")
    if hints.num_experts_per_tok not in (None, K):
        raise UserError(f"{arrays[0][0]}: {K} experts per token in it, not {hints.num_experts_per_tok}")
    highest = max((int(array.max()) for _, array in arrays if array.size), default=-1)
    E = hints.num_experts or max(highest + 1, K, 1)
    if highest >= E:
        raise DataError(f"{arrays[0][0]}: holds expert {highest}, and there are {E}")
    return {"layers": layers, "num_experts": E, "num_experts_per_tok": K, "recorded": (), "source": source}


def text_blocks(arrays: list[tuple[str, Array]], prompts: list[int | None]) -> Iterator[Block]:
    """Whole texts, one after the other: the prompt in one pass, then token by token.

    Where nobody knows how long the prompt was (None), all of a text counts as scored in one pass.
    """
    step = 0
    for sequence, ((_, ids), prompt) in enumerate(zip(arrays, prompts, strict=True)):
        T = len(ids)
        at = np.arange(T)
        first = T if prompt is None else min(prompt, T)
        steps = step + np.maximum(at - (max(first, 1) - 1), 0)
        phase = np.where(at < first, Phase.SCORING if prompt is None else Phase.PREFILL, Phase.DECODE)
        yield {"expert_ids": ids, "sequence": sequence, "position": at, "phase": phase, "step": steps}
        step = int(steps[-1]) + 1 if T else step
