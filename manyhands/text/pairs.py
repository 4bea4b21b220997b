"""Pairs of sequences for encoder-decoders: one is read, the other is to be written. Padded into batches.

B pairs, S tokens in the longest that is read, T in the longest that is written.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from manyhands.errors import DataError
from manyhands.text.walk import Walk, bits_of, shuffled

NO_TARGET = -100
"""The label of a place where nothing is to be predicted, as in Hugging Face's models."""

Pair = tuple[Sequence[int], Sequence[int]]
"""Token ids of (what is read, what is to be written), each with its end of text if the model is to know of one."""


@dataclass(frozen=True, slots=True)
class PairBatch:
    """A batch of pairs, padded on the right."""

    ids_BS: Tensor
    """int64, what the encoder reads."""
    mask_BS: Tensor
    """bool, false for padding."""
    labels_BT: Tensor
    """int64, what the decoder is to write; `NO_TARGET` behind its end."""

    def __len__(self) -> int:
        return len(self.ids_BS)

    @property
    def target_mask_BT(self) -> Tensor:
        """bool, false for padding: what of the decoder's input is real, and where it is asked for a token."""
        return self.labels_BT != NO_TARGET

    def decoder_ids(self, start_id: int, pad_id: int = 0) -> Tensor:
        """[B, T] int64, what the decoder reads: the labels moved one to the right behind `start_id`."""
        ids_BT = self.labels_BT.roll(1, dims=1)
        ids_BT[:, 0] = start_id
        return ids_BT.masked_fill_(ids_BT == NO_TARGET, pad_id)

    def to(self, device: torch.device | str) -> "PairBatch":
        """The same on another device."""
        return PairBatch(self.ids_BS.to(device), self.mask_BS.to(device), self.labels_BT.to(device))

    def split(self, size: int) -> "list[PairBatch]":
        """Parts of `size` pairs, each without the columns that are padding in all of its rows."""
        parts = zip(*(torch.split(x, size) for x in (self.ids_BS, self.mask_BS, self.labels_BT)), strict=True)
        return [_trimmed(PairBatch(*part)) for part in parts]


def pad_pairs(pairs: Sequence[Pair], pad_id: int = 0) -> PairBatch:
    """One batch of `pairs`. Raises `DataError` for none, and for one with nothing to read or nothing to write."""
    if not pairs or not all(len(source) and len(target) for source, target in pairs):
        raise DataError("a pair of sequences needs at least one token to read and one to write")
    sources, targets = zip(*pairs, strict=True)
    ids_BS = _padded(sources, pad_id)
    lengths_B = torch.tensor([len(source) for source in sources])
    mask_BS = torch.arange(ids_BS.shape[1]) < lengths_B[:, None]
    return PairBatch(ids_BS, mask_BS, _padded(targets, NO_TARGET))


class PairBatches:
    """An endless iterator of `PairBatch`es of `batch_size / world_size` pairs; each epoch in another order.

    `state_dict` is the exact position: what follows `load_state_dict` is bit-equal to what would have followed, on any
    number of ranks. `sha256` says which pairs they are.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        batch_size: int,
        seed: int,
        pad_id: int = 0,
        rank: int = 0,
        world_size: int = 1,
        sha256: str | None = None,
    ) -> None:
        """Raises `DataError` for no pairs, `ConfigError` if the processes cannot share a batch evenly."""
        if not pairs:
            raise DataError("there are no pairs of sequences to train on")
        self.pairs, self.seed, self.pad_id = pairs, seed, pad_id
        identity: dict[str, int | float | str] = {
            **({} if sha256 is None else {"sha256": sha256}),
            "batch_size": batch_size,
            "num_pairs": len(pairs),
            "seed": seed,
        }
        self.walk = Walk(self._order, identity, batch_size, rank, world_size)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> PairBatch:
        places_B, _ = self.walk.take()
        return pad_pairs([self.pairs[place] for place in places_B], self.pad_id)

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it is a position in."""
        return self.walk.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position. Raises `CheckpointError` if it is one in other data or other batches."""
        self.walk.load_state_dict(state)

    def _order(self, epoch: int) -> "np.ndarray[Any, np.dtype[np.int64]]":
        return shuffled(bits_of(self.seed, epoch), len(self.pairs))


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """[B, longest] int64."""
    padded = torch.full((len(rows), max(map(len, rows))), value, dtype=torch.int64)
    for row, ids in zip(padded, rows, strict=True):
        row[: len(ids)] = torch.as_tensor(ids, dtype=torch.int64)
    return padded


def _trimmed(batch: PairBatch) -> PairBatch:
    S, T = int(batch.mask_BS.sum(1).max()), int(batch.target_mask_BT.sum(1).max())
    return PairBatch(batch.ids_BS[:, :S], batch.mask_BS[:, :S], batch.labels_BT[:, :T])
