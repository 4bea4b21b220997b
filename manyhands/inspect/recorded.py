"""A recorded trace as what this room measures. Without the model there are no hidden states, so no random routers."""

from pathlib import Path

import numpy as np

from manyhands.errors import DataError
from manyhands.inspect.observed import Ints, Observed
from manyhands.inspect.texts import ENOUGH_TEXTS
from manyhands.trace.recording import Part, Trace

_BLOCK = 128


def is_trace(path: str | Path) -> bool:
    """Whether a path is a directory that says it holds a trace."""
    return (Path(path) / "trace.json").is_file()


def from_trace(trace: Trace, max_tokens: int) -> Observed:
    """The first `max_tokens` tokens of a trace, sequence by sequence, each in the order of its positions.

    Each sequence is a text; of fewer than 30, each 128 tokens are one, so that intervals have something to draw
    from. Raises `DataError` for a trace without tokens, and as `Trace.parts` does.
    """
    parts: list[Part] = []
    room = max_tokens
    for part in trace.parts():
        parts.append(part.rows(slice(0, room)))
        room -= len(parts[-1])
        if room <= 0:
            break
    if not parts or not sum(map(len, parts)):
        raise DataError(f"{trace.path}: the trace holds no token")
    sequence = np.concatenate([part.sequence for part in parts]).astype(np.int64)
    position = np.concatenate([part.position for part in parts])
    order = np.lexsort((position, sequence))
    ids = np.concatenate([part.expert_ids for part in parts])[order]
    _, sequence = np.unique(sequence[order], return_inverse=True)
    return Observed(
        layers=trace.manifest.layers,
        num_experts=trace.manifest.num_experts,
        expert_ids=np.where(ids == trace.manifest.none, -1, ids.astype(np.int32)),
        token_ids=np.concatenate([part.token_ids for part in parts])[order].astype(np.int64),
        sequence=sequence,
        text=_texts(sequence),
        domain=np.zeros(len(sequence), np.int64),
    )


def _texts(sequence: Ints) -> Ints:
    if sequence.max() + 1 >= ENOUGH_TEXTS:
        return sequence
    starts = np.flatnonzero(np.diff(sequence, prepend=-1))
    within = np.arange(len(sequence)) - starts[sequence]
    return np.unique(np.stack([sequence, within // _BLOCK]), axis=1, return_inverse=True)[1].ravel()
