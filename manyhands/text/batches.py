"""Batches for training, endless and resumable, and for evaluation, once through.

The stream of tokens is cut into sequences of S + 1 that overlap by one: S inputs and S targets, and each token is a
target once. Each epoch starts cutting at another offset and shuffles with its own seed. N = number of tokens,
S = sequence_length, B = batch_size.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from manyhands.errors import DataError
from manyhands.text.walk import Walk, bits_of, shuffled


class PackedBatches:
    """An endless iterator of `[B / world_size, S + 1]` int64 tensors.

    `batch_size` is the global batch; rank r takes the r-th slice of its rows, so the order in which sequences
    are seen does not depend on `world_size`. A batch may straddle two epochs. `state_dict` is the exact
    position: what follows `load_state_dict` is bit-equal to what would have followed, on any number of ranks.
    """

    def __init__(
        self,
        tokens: npt.NDArray[Any],
        sequence_length: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        sha256: str | None = None,
    ) -> None:
        """`tokens [N]` of any integer type; `sha256` of their file says which tokens they are, and a position is one in
        those alone. Raises `DataError` for N < S + 1, `ConfigError` for B % world_size."""
        if len(tokens) < sequence_length + 1:
            raise DataError(
                f"{len(tokens)} tokens are too few for one sequence: sequence_length = {sequence_length} "
                f"needs {sequence_length + 1}; add text or shorten the sequence"
            )
        self.tokens, self.sequence_length, self.seed = tokens, sequence_length, seed
        identity: dict[str, int | float | str] = {
            **({} if sha256 is None else {"sha256": sha256}),
            "sequence_length": sequence_length,
            "batch_size": batch_size,
            "num_tokens": len(tokens),
            "seed": seed,
        }
        self.walk = Walk(self._cut, identity, batch_size, rank, world_size)

    @property
    def epoch(self) -> int:
        """That of the next sequence, from 0."""
        return self.walk.epoch

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> torch.Tensor:
        starts_B, _ = self.walk.take()
        ids_BS = self.tokens[starts_B[:, None] + np.arange(self.sequence_length + 1)]
        return torch.from_numpy(ids_BS.astype(np.int64))

    def state_dict(self) -> dict[str, int | float | str]:
        """The position, and what it is a position in."""
        return self.walk.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position. Raises `CheckpointError` if it is one in other data or other batches."""
        self.walk.load_state_dict(state)

    def _cut(self, epoch: int) -> npt.NDArray[np.int64]:
        return cut_tokens(len(self.tokens), self.sequence_length + 1, self.sequence_length, self.seed, epoch)


def cut_tokens(num_tokens: int, length: int, step: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Where each sequence of `epoch` starts, in the order of that epoch: every `step` tokens one of `length`."""
    bits = bits_of(seed, epoch)
    offset = int(bits.random_raw()) % (min(step - 1, num_tokens - length) + 1)
    return offset + shuffled(bits, (num_tokens - length - offset) // step + 1) * step


def evaluation_batches(
    tokens: npt.NDArray[Any], sequence_length: int, batch_size: int, max_batches: int | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """All of `tokens [N]` in order, or its first `max_batches` batches: `(ids [b, S + 1] int64, target_mask [b, S])`.

    Every token but the first is a target exactly once: `target_mask` is False only behind the end of the last
    sequence, which is filled up with id 0. b is `batch_size`, less in the last batch.
    Raises `DataError`, on the call, for fewer than two tokens.
    """
    if len(tokens) < 2:
        raise DataError(f"{len(tokens)} tokens are too few to evaluate on: 2 are needed")
    starts = np.arange(0, len(tokens) - 1, sequence_length)
    if max_batches is not None:
        starts = starts[: max_batches * batch_size]
    return _evaluation_batches(tokens, sequence_length, batch_size, starts)


def _evaluation_batches(
    tokens: npt.NDArray[Any], sequence_length: int, batch_size: int, starts: npt.NDArray[np.int64]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for first in range(0, len(starts), batch_size):
        where_BS = starts[first : first + batch_size, None] + np.arange(sequence_length + 1)
        inside_BS = where_BS < len(tokens)
        ids_BS = np.where(inside_BS, tokens[np.minimum(where_BS, len(tokens) - 1)], 0)
        yield torch.from_numpy(ids_BS.astype(np.int64)), torch.from_numpy(inside_BS[:, 1:])
