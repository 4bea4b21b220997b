"""vLLM's `routed_experts`: a .npy array [T − 1, L, K], in a file or as base64 in an answer of its server.

    numpy.save("routed.npy", output.outputs[0].routed_experts)    # LLM(…, enable_return_routed_experts=True)
    curl …/v1/completions -d '{…}' > answer.json                  # vllm serve … --enable-return-routed-experts

An answer says how long the prompt was; a .npy file does not (`Hints.prompt_tokens`). The last token of a text is not
in it: it was never run. Where ids are unsigned, the largest number is no expert; where not, -1 is.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from manyhands.errors import DataError
from manyhands.trace.foreign.common import (
    MOST_PAIRS,
    Foreign,
    Hints,
    from_base64,
    json_of,
    read_whole,
    text_blocks,
    text_fields,
)
from manyhands.trace.part import Array

_MOST_HEADER = 4096
_HEADER = re.compile(
    r"\{'descr': '([<|][iu][1248])', 'fortran_order': False, 'shape': \((\d{1,9}), (\d{1,9}), (\d{1,9})\), ?\}"
)
"""As numpy writes it. Its own reader parses the header as Python, with errors of every kind."""


def read(path: Path, hints: Hints) -> Foreign:
    """A .npy file, base64 of one, or an answer's JSON. Raises `DataError`."""
    data = read_whole(path)
    if data.startswith(b"\x93NUMPY"):
        found: list[tuple[str, Array, int | None]] = [(str(path), _array(data, str(path)), hints.prompt_tokens)]
    elif data.lstrip()[:1] == b"{":
        found = _answer(json_of(data, str(path)), str(path), hints.prompt_tokens)
    else:
        where = str(path)
        found = [(where, _array(from_base64(data.strip(), where), where), hints.prompt_tokens)]
    arrays = [(where, array) for where, array, _ in found]
    fields = text_fields(arrays, hints, f"imported from vLLM's routed_experts, {path.name}")
    return Foreign(fields, lambda: text_blocks(arrays, [prompt for _, _, prompt in found]))


def _answer(answer: Any, where: str, prompt: int | None) -> list[tuple[str, Array, int | None]]:
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not choices:
        raise DataError(f"{where}: no 'choices' in it; expected an answer of /v1/completions or /v1/chat/completions")
    usage = answer.get("usage")
    if isinstance(usage, dict) and type(usage.get("prompt_tokens")) is int:
        prompt = max(0, usage["prompt_tokens"]) if prompt is None else prompt
    found: list[tuple[str, Array, int | None]] = []
    for number, choice in enumerate(choices):
        here = f"{where}: choices[{number}].routed_experts"
        text = choice.get("routed_experts") if isinstance(choice, dict) else None
        if text is None:
            raise DataError(f"{here} is missing; ask with return_routed_experts, and start vLLM with --enable-return-…")
        found.append((here, _array(from_base64(text, here), here), prompt))
    return found


def _array(data: bytes, where: str) -> Array:
    """[T, L, K] int64, -1 for no expert."""
    wide = 4 if data[6:7] == b"\x02" else 2  # bytes of the header's length
    start = 8 + wide + int.from_bytes(data[8 : 8 + wide], "little")
    header = data[8 + wide : start].decode("latin-1").strip() if start <= 8 + wide + _MOST_HEADER else ""
    match = _HEADER.fullmatch(header)
    if not data.startswith(b"\x93NUMPY") or match is None:
        what = f" ({header[:80]!r})" if header.isprintable() and header else ""
        raise DataError(f"{where}: not a .npy array of integers [T, L, K]{what}")
    dtype, shape = np.dtype(match[1]), (int(match[2]), int(match[3]), int(match[4]))
    count = shape[0] * shape[1] * shape[2]
    if 0 in shape[1:] or count > MOST_PAIRS or count * dtype.itemsize != len(data) - start:
        raise DataError(f"{where}: {len(data):,} bytes do not hold {dtype} {list(shape)}, or it is too long")
    ids = np.frombuffer(data, dtype, count, start).reshape(shape).astype(np.int64)
    if dtype.kind == "u":
        ids[ids == int(np.iinfo(dtype).max)] = -1
    if count and (int(ids.min()) < -1 or int(ids.max()) >= (1 << 16) - 1):
        raise DataError(f"{where}: holds {int(ids.min())} to {int(ids.max())}, which are not experts")
    return ids
