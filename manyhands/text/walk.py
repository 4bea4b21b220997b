"""An endless, shuffled, resumable walk over what a run trains on, each rank on its own rows of each batch.

B = batch_size.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from manyhands.errors import CheckpointError, ConfigError


class Walk:
    """Where the next sequences are: batch by batch, epoch by epoch.

    `batch_size` is the global batch; rank r takes the r-th slice of its rows, so the order in which sequences are seen
    does not depend on `world_size`. A batch may straddle two epochs.
    """

    def __init__(
        self,
        cut: Callable[[int], npt.NDArray[np.int64]],
        identity: Mapping[str, int | float | str],
        batch_size: int,
        rank: int,
        world_size: int,
    ) -> None:
        """`cut(epoch)` are the places of an epoch in its order, a function of the epoch alone; `identity` says what the
        places are in: a position is one in that alone. Raises `ConfigError` for B % world_size."""
        if batch_size % world_size:
            raise ConfigError(f"batch_size = {batch_size} is not divisible by the {world_size} processes")
        assert 0 <= rank < world_size
        self.identity, self.batch_size = dict(identity), batch_size
        self._cut = cut
        self._mine = slice(rank * (batch_size // world_size), (rank + 1) * (batch_size // world_size))
        self._enter(epoch=0, index=0)

    def take(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The next batch's places [B / world_size], and the epoch that each belongs to."""
        places: list[npt.NDArray[np.int64]] = []
        epochs: list[npt.NDArray[np.int64]] = []
        missing = self.batch_size
        while missing:
            taken = self._places[self.index : self.index + missing]
            places.append(taken)
            epochs.append(np.full(len(taken), self.epoch, dtype=np.int64))
            missing -= len(taken)
            self.index += len(taken)
            if self.index == len(self._places):
                self._enter(self.epoch + 1, 0)
        return np.concatenate(places)[self._mine], np.concatenate(epochs)[self._mine]

    @property
    def epochs(self) -> float:
        """How often everything was seen, with the part of this epoch."""
        return self.epoch + self.index / len(self._places)

    def state_dict(self) -> dict[str, int | float | str]:
        """The position, and what it is a position in."""
        return {"epoch": self.epoch, "index": self.index, **self.identity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position; what follows is bit-equal to what would have followed, on any number of ranks.

        Raises `CheckpointError` if it is one in other data or other batches.
        """
        for name, value in self.identity.items():
            if state.get(name) != value and not (name == "sha256" and name not in state):  # older ones are without
                raise CheckpointError(
                    f"data position: saved with {name} = {state.get(name)}, this run has {value}; "
                    "a run resumes only on the same data and batches"
                )
        epoch, index = state.get("epoch"), state.get("index")
        if not isinstance(epoch, int) or not isinstance(index, int) or epoch < 0:
            raise CheckpointError(f"data position: epoch = {epoch!r}, index = {index!r} is not a position")
        places = self._cut(epoch)
        if not 0 <= index < len(places):
            raise CheckpointError(f"data position: index = {index} of {len(places)} sequences is not a position")
        self.epoch, self.index, self._places = epoch, index, places

    def _enter(self, epoch: int, index: int) -> None:
        self.epoch, self.index, self._places = epoch, index, self._cut(epoch)


def bits_of(seed: int, *where: int) -> np.random.PCG64:
    """A bit generator for one place of a run, the same whatever came before.

    Of the raw output: NumPy keeps bit generators equal between versions, but not `permutation` and its like.
    """
    return np.random.PCG64(np.random.SeedSequence([seed % (1 << 64), *where]))


def shuffled(bits: np.random.PCG64, count: int) -> npt.NDArray[np.int64]:
    """0…count − 1 in another order, by sorting raw output."""
    return np.argsort(bits.random_raw(count), kind="stable").astype(np.int64)
