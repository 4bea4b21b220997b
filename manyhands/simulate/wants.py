"""A trace as a cache sees it: for each forward pass and layer, the distinct experts that its tokens chose.

T tokens   L layers with experts   K experts per token   S forward passes   W = S·L wants
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from manyhands.simulate.tokens import Tokens

Array = npt.NDArray[np.int64]
_CHUNK = 1 << 20  # pairs that are sorted at once
_LISTED = 4096  # wants that become Python lists at once


@dataclass(frozen=True)
class Wants:
    """W wants in the order in which forward passes ask: layer after layer, pass after pass.

    experts       [sum of `sizes`] the distinct experts of each want, ascending, one want after the other.
    sizes         [W] how many each want has; 0 where no token of a pass goes through a layer's experts.
    tokens        [S] tokens of each pass.
    decode        [S] whether all tokens of the pass were decoded (not of a prompt, not trained on).
    record_bytes  [L] what one expert of each layer takes.
    """

    experts: npt.NDArray[np.uint16]
    sizes: npt.NDArray[np.int32]
    tokens: Array
    decode: npt.NDArray[np.bool_]
    record_bytes: tuple[int, ...]

    @classmethod
    def of(cls, tokens: Tokens, record_bytes: Sequence[int]) -> "Wants":
        """What the forward passes of `tokens` want of layers whose experts take `record_bytes` [L] each."""
        T, L, K = tokens.expert_ids.shape
        borders = np.flatnonzero(np.diff(tokens.step, prepend=tokens.step[:1] - 1))
        ends = np.append(borders[1:], T)
        experts, sizes, first = [], [], 0
        while first < len(borders):
            at = int(borders[first])
            last = max(first, int(np.searchsorted(ends, at + max(1, _CHUNK // (L * K)), side="right")) - 1)
            rows = slice(at, int(ends[last]))
            found = _distinct(tokens.expert_ids[rows], tokens.step[rows], tokens.none)
            experts.append(found[0])
            sizes.append(found[1])
            first = last + 1
        decoded = np.minimum.reduceat(tokens.decode, borders) if T else np.zeros(0, np.bool_)
        return cls(
            np.concatenate([*experts, np.zeros(0, np.uint16)]),
            np.concatenate([*sizes, np.zeros(0, np.int32)]),
            (ends - borders).astype(np.int64),
            decoded.astype(np.bool_),
            tuple(record_bytes),
        )

    def lists(self) -> Iterator[list[int]]:
        """The experts of each want, W times."""
        return runs(self.experts, self.sizes)


def runs(flat: npt.NDArray[Any], sizes: npt.NDArray[np.int32]) -> Iterator[list[int]]:
    """`flat` cut into lists of these sizes."""
    ends = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    for first in range(0, len(sizes), _LISTED):
        borders = (ends[first : first + _LISTED + 1] - ends[first]).tolist()
        listed = flat[ends[first] :][: borders[-1]].tolist()
        for begin, end in itertools.pairwise(borders):
            yield listed[begin:end]


def _distinct(
    ids_TLK: npt.NDArray[np.uint16], step_T: npt.NDArray[np.int32], none: int
) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.int32]]:
    """The experts and sizes of whole forward passes."""
    T, L, _ = ids_TLK.shape
    number_T = np.cumsum(np.diff(step_T, prepend=step_T[:1]) != 0)
    S = int(number_T[-1]) + 1
    if S == T:
        ids_TLK = np.sort(ids_TLK, axis=-1)
        new = np.diff(ids_TLK, axis=-1, prepend=np.full_like(ids_TLK[..., :1], none)) != 0
        new[..., 0] = True
        new &= ids_TLK != none
        return ids_TLK[new].astype(np.uint16), new.sum(-1, dtype=np.int32).reshape(-1)
    want_TL = number_T[:, None] * L + np.arange(L)
    key = (want_TL[..., None].astype(np.int64) << 16 | ids_TLK)[ids_TLK != none]
    key = np.unique(key)
    return (key & 0xFFFF).astype(np.uint16), np.bincount(key >> 16, minlength=S * L).astype(np.int32)
