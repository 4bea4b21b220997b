"""SGLang's `routed_experts`: base64 of raw int32 [T − 1, L, K] without a header, in an answer or as a file of bytes.

    curl …/v1/completions -d '{…, "return_routed_experts": true}' > answer.json    # --enable-return-routed-experts

Nothing says L and K: they have to be given (`Hints.layers`, `num_experts_per_tok`). OpenAI's routes have the string in
`sglext`, /generate in `meta_info`. What SGLang's recorder of expert distributions writes is a pickle (.pt): not read.
"""

from pathlib import Path
from typing import Any

import numpy as np

from manyhands.errors import DataError, UserError
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


def read(path: Path, hints: Hints) -> Foreign:
    """An answer's JSON, or the bytes. Raises `DataError`, and `UserError` without `layers` or `num_experts_per_tok`."""
    if hints.layers is None or hints.num_experts_per_tok is None:
        raise UserError(
            f"{path}: SGLang does not say how many layers and experts per token there are: "
            "give --layers and --num-experts-per-tok"
        )
    data, where = read_whole(path), str(path)
    if data.lstrip()[:1] in (b"{", b"["):
        found = list(_answers(json_of(data, where), where, hints.prompt_tokens))
    else:
        found = [(where, data, hints.prompt_tokens)]
    if not found:
        raise DataError(f"{where}: there is no routed_experts in it; ask with return_routed_experts")
    arrays = [(here, _array(raw, here, len(hints.layers), hints.num_experts_per_tok)) for here, raw, _ in found]
    fields = text_fields(arrays, hints, f"imported from SGLang's routed_experts, {path.name}")
    return Foreign(fields, lambda: text_blocks(arrays, [prompt for _, _, prompt in found]))


def is_answer(path: Path) -> bool:
    """Whether a JSON file is one of SGLang's: no other has these names."""
    data = read_whole(path)
    return b'"sglext"' in data or b'"meta_info"' in data


def _answers(value: Any, where: str, prompt: int | None) -> list[tuple[str, bytes, int | None]]:
    found: list[tuple[str, bytes, int | None]] = []
    for number, answer in enumerate(value if isinstance(value, list) else [value]):
        if not isinstance(answer, dict):
            raise DataError(f"{where}: expected an answer, or a list of answers")
        for one in answer.get("choices") or [answer]:
            places = [one, answer] if isinstance(one, dict) else [answer]
            inner = [place.get(key) for place in places for key in ("sglext", "meta_info")]
            text = next((i["routed_experts"] for i in inner if isinstance(i, dict) and i.get("routed_experts")), None)
            if text is None:
                continue
            counts = [place.get("prompt_tokens") for place in (*inner, answer.get("usage")) if isinstance(place, dict)]
            known = next((count for count in counts if type(count) is int and count >= 0), None)
            here = f"{where}: answer {number}"
            found.append((here, from_base64(text, here), known if prompt is None else prompt))
    return found


def _array(raw: bytes, where: str, L: int, K: int) -> Array:
    if len(raw) % (4 * L * K) or len(raw) // 4 > MOST_PAIRS:
        raise DataError(f"{where}: {len(raw):,} bytes are not int32 [T, {L}, {K}], or too many")
    ids = np.frombuffer(raw, "<i4").reshape(-1, L, K).astype(np.int64)
    if ids.size and (int(ids.min()) < -1 or int(ids.max()) >= (1 << 16) - 1):
        raise DataError(f"{where}: holds {int(ids.min())} to {int(ids.max())}, which are not experts: another L or K?")
    return ids
