"""The tokens of a trace in memory, and the same tokens as if several sequences had been served at once.

T tokens   L layers with experts   K experts per token
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from manyhands.errors import DataError, UserError
from manyhands.trace.recording import Manifest, Phase, Trace


@dataclass(frozen=True)
class Tokens:
    """Who went where, and with whom.

    expert_ids  [T, L, K] uint8 or uint16; `none` for no expert.
    step        [T] tokens of equal step shared a forward pass; never falls.
    sequence    [T] which text a token is of.
    decode      [T] whether it was decoded one after the other, not given with a prompt.
    none        the number that stands for no expert.
    """

    expert_ids: npt.NDArray[Any]
    step: npt.NDArray[np.int32]
    sequence: npt.NDArray[np.int32]
    decode: npt.NDArray[np.bool_]
    none: int

    @classmethod
    def of(cls, trace: Trace, max_tokens: int | None = None, *, kept: bool = False) -> "Tokens":
        """Of the whole trace, or of its first `max_tokens`. Raises `DataError` if there are none, and as `parts` does.

        `kept`: pairs that an expert's capacity left out have no expert, where the trace says which those are.
        Takes L·K bytes a token, twice that from 256 experts on.
        """
        parts, left = [], len(trace) if max_tokens is None else max_tokens
        for part in trace.parts():
            rows = part.rows(slice(0, left))
            if kept and rows.kept is not None:
                none = rows.expert_ids.dtype.type(trace.manifest.none)
                rows = replace(rows, expert_ids=np.where(rows.kept == 0, none, rows.expert_ids))
            parts.append(rows)
            left -= len(rows)
            if left <= 0:
                break
        if not parts:
            raise DataError(f"{trace.path}: there is no token in it")

        def joined(name: str) -> npt.NDArray[Any]:
            return np.concatenate([getattr(part, name) for part in parts])

        return cls(
            joined("expert_ids"),
            joined("step"),
            joined("sequence"),
            joined("phase") == Phase.DECODE,
            trace.manifest.none,
        )

    def __len__(self) -> int:
        return len(self.step)

    def one_by_one(self) -> "Tokens":
        """The decoded tokens (all of them where none was decoded), each in a forward pass of its own."""
        chosen = np.flatnonzero(self.decode) if self.decode.any() else np.arange(len(self))
        return Tokens(
            self.expert_ids[chosen],
            np.arange(len(chosen), dtype=np.int32),
            self.sequence[chosen],
            np.ones(len(chosen), np.bool_),
            self.none,
        )

    def merged(self, sequences: int) -> "Merged":
        """`one_by_one`, but `sequences` texts advance at once: a pass has one token of each.

        A text that ends makes place for the next. A trace of fewer texts is cut into as many successive pieces, which
        share more experts than different texts do. Raises `UserError` for more sequences than tokens.
        """
        alone = self.one_by_one()
        if not 1 <= sequences <= len(alone):
            raise UserError(
                f"--sequences {sequences}: the trace has {len(alone):,} tokens to decode, and each gives one"
            )
        order = np.argsort(alone.sequence, kind="stable")
        lengths = np.unique(alone.sequence, return_counts=True)[1].tolist()
        cut = len(lengths) < sequences
        if cut:
            ends = np.linspace(0, len(alone), sequences + 1).astype(int)
            lengths = np.diff(ends).tolist()
        step = np.concatenate(_lanes(lengths, sequences))
        by_step = np.argsort(step, kind="stable")
        order = order[by_step]
        merged = Tokens(
            alone.expert_ids[order], step[by_step].astype(np.int32), alone.sequence[order], alone.decode, alone.none
        )
        return Merged(merged, cut)


@dataclass(frozen=True)
class Merged:
    """Tokens of several sequences in common passes; `cut`: they are pieces of fewer texts."""

    tokens: Tokens
    cut: bool


def record_sizes(manifest: Manifest, given: Sequence[int] | int | None) -> tuple[int, ...]:
    """[L] bytes of one expert in each layer: as given (for each layer, or for all), or as the trace says.

    Raises `UserError` where nobody says it.
    """
    L = len(manifest.layers)
    if given is None:
        if manifest.record_bytes is None:
            raise UserError("the trace does not say how many bytes an expert takes: give --record-bytes, like 4.3MB")
        return manifest.record_bytes
    sizes = (given,) * L if isinstance(given, int) else tuple(given)
    if len(sizes) != L:
        raise UserError(f"{len(sizes)} sizes of experts for {L} layers")
    return sizes


def _lanes(lengths: list[int], lanes: int) -> list[npt.NDArray[np.int64]]:
    """The steps of each text when the next begins wherever a place is free first."""
    free = [0] * lanes
    steps = []
    for length in lengths:
        lane = free.index(min(free))
        steps.append(np.arange(free[lane], free[lane] + length))
        free[lane] += length
    return steps
