"""Several texts as one rectangle of token ids with its mask, as transformers' tokenizers give it when called.

B texts, S tokens of the longest.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from manyhands.errors import DataError

Padding = bool | Literal["longest", "max_length", "do_not_pad"]
Side = Literal["left", "right"]
Tensors = Literal["pt", "np"]


def padded(
    rows: Sequence[Sequence[int]],
    padding: Padding,
    max_length: int | None,
    pad_id: int | None,
    side: str,
    tensors: str | None,
) -> dict[str, Any]:
    """`input_ids` and `attention_mask` [B, S], lists or tensors (int64); the mask is 0 for padding, which has `pad_id`.

    Raises `DataError` for what is not to be had: an argument that there is not, no token to pad with, rows of
    different lengths as a tensor.
    """
    if tensors not in (None, "pt", "np"):
        raise DataError(f"return_tensors = {tensors!r}: there are 'pt' (torch), 'np' (numpy) and None (lists)")
    if side not in ("left", "right"):
        raise DataError(f"padding_side = {side!r}: it is 'left' or 'right'")
    lengths = [len(row) for row in rows]
    if padding in (True, "longest"):
        least = max(lengths, default=0)
    elif padding == "max_length" and max_length is not None:
        least = max_length
    elif padding in (False, "do_not_pad"):
        least = 0
    else:
        why = "needs max_length" if padding == "max_length" else "it is True, False, 'longest' or 'max_length'"
        raise DataError(f"padding = {padding!r}: {why}")
    if pad_id is None and any(length < least for length in lengths):
        raise DataError("padding: this tokenizer has neither a pad_token nor an end of text to pad with")
    if tensors is not None and len({max(length, least) for length in lengths}) > 1:
        raise DataError(f"texts of {min(lengths)} to {max(lengths)} tokens are no tensor: give padding=True")
    ids, masks = [], []
    for row in rows:
        fill, ones = [0] * (least - len(row)), [1] * len(row)
        blank = [pad_id or 0] * len(fill)
        ids.append([*blank, *row] if side == "left" else [*row, *blank])
        masks.append([*fill, *ones] if side == "left" else [*ones, *fill])
    return {"input_ids": _as(ids, tensors), "attention_mask": _as(masks, tensors)}


def _as(rows: list[list[int]], tensors: str | None) -> Any:
    if tensors is None:
        return rows
    array = np.asarray(rows, dtype=np.int64).reshape(len(rows), -1 if rows else 0)
    if tensors == "np":
        return array
    import torch

    return torch.from_numpy(array)
