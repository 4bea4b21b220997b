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

from manyhands.errors import CheckpointError, ConfigError, DataError


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
        if batch_size % world_size:
            raise ConfigError(f"batch_size = {batch_size} is not divisible by the {world_size} processes")
        assert 0 <= rank < world_size
        self.tokens, self.sequence_length, self.batch_size, self.seed = tokens, sequence_length, batch_size, seed
        self.sha256 = sha256
        self._mine = slice(rank * (batch_size // world_size), (rank + 1) * (batch_size // world_size))
        self._enter(epoch=0, index=0)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> torch.Tensor:
        rows: list[npt.NDArray[np.int64]] = []
        missing = self.batch_size
        while missing:
            taken = self._starts[self.index : self.index + missing]
            rows.append(taken)
            missing -= len(taken)
            self.index += len(taken)
            if self.index == len(self._starts):
                self._enter(self.epoch + 1, 0)
        starts_B = np.concatenate(rows)[self._mine]
        ids_BS = self.tokens[starts_B[:, None] + np.arange(self.sequence_length + 1)]
        return torch.from_numpy(ids_BS.astype(np.int64))

    def state_dict(self) -> dict[str, int | str]:
        """The position, and what it is a position in."""
        return {"epoch": self.epoch, "index": self.index, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position. Raises `CheckpointError` if it is one in other data or other batches."""
        for name, value in self._identity().items():
            if state.get(name) != value and not (name == "sha256" and name not in state):  # older ones are without
                raise CheckpointError(
                    f"data position: saved with {name} = {state.get(name)}, this run has {value}; "
                    "a run resumes only on the same data and batches"
                )
        epoch, index = state.get("epoch"), state.get("index")
        if not isinstance(epoch, int) or not isinstance(index, int) or epoch < 0:
            raise CheckpointError(f"data position: epoch = {epoch!r}, index = {index!r} is not a position")
        starts = self._cut(epoch)
        if not 0 <= index < len(starts):
            raise CheckpointError(f"data position: index = {index} of {len(starts)} sequences is not a position")
        self.epoch, self.index, self._starts = epoch, index, starts

    def _identity(self) -> dict[str, int | str]:
        return {
            **({} if self.sha256 is None else {"sha256": self.sha256}),
            "sequence_length": self.sequence_length,
            "batch_size": self.batch_size,
            "num_tokens": len(self.tokens),
            "seed": self.seed,
        }

    def _enter(self, epoch: int, index: int) -> None:
        self.epoch, self.index, self._starts = epoch, index, self._cut(epoch)

    def _cut(self, epoch: int) -> npt.NDArray[np.int64]:
        """Where each sequence of `epoch` starts, in the order of that epoch.

        Sorting raw PCG64 output, because NumPy keeps bit generators equal between versions, but not `permutation`.
        """
        raw = np.random.PCG64(np.random.SeedSequence([self.seed % (1 << 64), epoch]))
        last_offset = min(self.sequence_length - 1, len(self.tokens) - self.sequence_length - 1)
        offset = int(raw.random_raw()) % (last_offset + 1)
        num_sequences = (len(self.tokens) - 1 - offset) // self.sequence_length
        order = np.argsort(raw.random_raw(num_sequences), kind="stable")
        return offset + order.astype(np.int64) * self.sequence_length


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
