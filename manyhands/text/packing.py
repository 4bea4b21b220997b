"""Batches of rows: packed, several rows one behind the other in the room of a sequence, or each padded.

Packed rows do not see each other: the model is given their lengths (`Decoder.hidden(documents=…)`), and each has
positions and attention of its own. So packing changes no figure, and no place is padding.

R rows, S the room of a sequence, B sequences in a batch, T tokens in a batch, n the tokens of a row: it is read without
its last token and predicts without its first, so it takes n − 1 places.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from manyhands.errors import DataError
from manyhands.text.pairs import NO_TARGET
from manyhands.text.row_file import RowFile
from manyhands.text.walk import Walk, bits_of, shuffled


@dataclass(frozen=True, slots=True)
class RowBatch:
    """Sequences of a batch or of a part of it, each of one row or of several packed ones."""

    sequences: tuple[tuple[tuple[Tensor, Tensor], ...], ...]
    """Of each its rows: what is read [n − 1] int64, and the labels [n − 1] int64, `NO_TARGET` if nothing is asked."""
    packed: bool
    reference: tuple[tuple[float, ...], ...] = ()
    """Of each its rows' log-likelihoods by the model that preferences are learnt from; empty without."""

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def rows(self) -> list[tuple[Tensor, Tensor]]:
        """Of all sequences."""
        return [row for sequence in self.sequences for row in sequence]

    @property
    def lengths(self) -> list[int]:
        """The places of each row."""
        return [len(read) for read, _ in self.rows]

    @property
    def targets(self) -> int:
        """Tokens that are asked for."""
        return sum(int((labels != NO_TARGET).sum()) for _, labels in self.rows)

    def split(self, size: int | None) -> "list[RowBatch]":
        """Parts of `size` sequences."""
        size = size or len(self)
        parts = [slice(i, i + size) for i in range(0, len(self), size)]
        return [RowBatch(self.sequences[part], self.packed, self.reference[part]) for part in parts]

    def in_a_row(self) -> tuple[Tensor, Tensor]:
        """What is read and the labels, [1, T] both, of rows one behind the other."""
        read, labels = zip(*self.rows, strict=True)
        return torch.cat(read)[None], torch.cat(labels)[None]

    def padded(self) -> tuple[Tensor, Tensor, Tensor]:
        """What is read, whether it is a token, and the labels, [rows, longest] all, padded on the right."""
        read, labels = zip(*self.rows, strict=True)
        ids = torch.nn.utils.rnn.pad_sequence(list(read), batch_first=True)
        asked = torch.nn.utils.rnn.pad_sequence(list(labels), batch_first=True, padding_value=NO_TARGET)
        real = torch.arange(ids.shape[1]) < torch.tensor(self.lengths)[:, None]
        return ids, real, asked


class RowBatches:
    """An endless iterator of `RowBatch`es of `batch_size / world_size` sequences, each epoch packed in another order.

    `state_dict` is the exact position: what follows `load_state_dict` is bit-equal to what would have followed, on any
    number of ranks. `sha256` says which rows they are.
    """

    def __init__(
        self,
        rows: RowFile,
        sequence_length: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        packed: bool = True,
        sha256: str | None = None,
        group: int = 1,
        reference: npt.NDArray[np.float64] | None = None,
    ) -> None:
        """Each `group` rows stay together, in one sequence. `reference` [R] goes along with the rows.

        Raises `DataError` for a row that is longer than a sequence, `ConfigError` if the processes cannot share a
        batch evenly."""
        self.rows, self.packed, self.sequence_length, self.seed = rows, packed, sequence_length, seed
        self.group, self.reference, self.places = group, reference, places_of(rows, group)
        if int(self.places.max()) > sequence_length:
            raise DataError(
                f"a row of {int(self.places.max()) + group} tokens is longer than sequence_length + {group}"
            )
        identity: dict[str, int | float | str] = {
            **({} if sha256 is None else {"sha256": sha256}),
            "sequence_length": sequence_length,
            "batch_size": batch_size,
            "num_rows": len(rows),
            "packed": packed,
            "seed": seed,
            **({} if group == 1 else {"group": group}),
        }
        self._known: dict[int, list[list[int]]] = {}
        self.walk = Walk(self._order, identity, batch_size, rank, world_size)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> RowBatch:
        places_B, epochs_B = self.walk.take()
        where = zip(places_B.tolist(), epochs_B.tolist(), strict=True)
        bins = [self._bins(epoch)[place] for place, epoch in where]
        return batch_of(self.rows, bins, self.packed, self.reference)

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it is a position in."""
        return self.walk.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position. Raises `CheckpointError` if it is one in other data or other batches."""
        self.walk.load_state_dict(state)

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        return shuffled(bits_of(self.seed, epoch, 1), len(self._bins(epoch)))

    def _bins(self, epoch: int) -> list[list[int]]:
        """Which rows each sequence of an epoch holds."""
        if epoch not in self._known:
            self._known = {known: bins for known, bins in self._known.items() if known == epoch - 1}
            order = shuffled(bits_of(self.seed, epoch), len(self.places))
            self._known[epoch] = bins_of(self.places, order, self.sequence_length, self.packed, self.group)
        return self._known[epoch]


def places_of(rows: RowFile, group: int) -> npt.NDArray[np.int64]:
    """[R / group]: the places of each `group` rows."""
    places_G: npt.NDArray[np.int64] = (rows.lengths - 1).reshape(-1, group).sum(1)
    return places_G


def bins_of(
    places: npt.NDArray[np.int64], order: npt.NDArray[np.int64], room: int, packed: bool, group: int
) -> list[list[int]]:
    """Which rows each sequence holds, where groups of rows with these `places` are taken in `order`."""
    bins = best_fit(places[order].tolist(), room) if packed else [[number] for number in range(len(order))]
    return [[int(order[i]) * group + k for i in bin for k in range(group)] for bin in bins]


def batch_of(
    rows: RowFile,
    bins: Sequence[Sequence[int]],
    packed: bool,
    reference: npt.NDArray[np.float64] | None = None,
) -> RowBatch:
    """The rows of these numbers, several to a sequence."""
    known = () if reference is None else tuple(tuple(reference[list(bin)].tolist()) for bin in bins)
    return RowBatch(tuple(tuple(_row(rows, number) for number in bin) for bin in bins), packed, known)


def in_order(
    rows: RowFile,
    sequence_length: int,
    batch_size: int,
    packed: bool = True,
    group: int = 1,
    reference: npt.NDArray[np.float64] | None = None,
) -> Iterator[RowBatch]:
    """All rows once, for validation: always in the same batches."""
    places = places_of(rows, group)
    bins = bins_of(places, np.arange(len(places)), sequence_length, packed, group)
    for first in range(0, len(bins), batch_size):
        yield batch_of(rows, bins[first : first + batch_size], packed, reference)


def best_fit(places: Sequence[int], room: int) -> list[list[int]]:
    """Numbers of `places`, each in a bin whose sum is at most `room`: the longest first, each where the least is left.

    Best-fit decreasing: at most 11/9 of the fewest bins, and one (Johnson 1973). Of equals the first comes first.
    """
    bins: list[list[int]] = []
    with_room: dict[int, list[int]] = {}
    """Which bins have so many places left."""
    left = 0
    """Bit n: whether any has n."""
    for number in sorted(range(len(places)), key=lambda number: -places[number]):
        need = places[number]
        enough = left >> need
        if enough:
            least = need + (enough & -enough).bit_length() - 1
            chosen = with_room[least].pop()
            if not with_room[least]:
                left ^= 1 << least
        else:
            least, chosen = room, len(bins)
            bins.append([])
        bins[chosen].append(number)
        if least > need:
            with_room.setdefault(least - need, []).append(chosen)
            left |= 1 << (least - need)
    return bins


def _row(rows: RowFile, number: int) -> tuple[Tensor, Tensor]:
    """What is read of a row, and the labels."""
    ids, learnt = rows.row(number)
    return torch.from_numpy(ids[:-1]), torch.from_numpy(np.where(learnt[1:], ids[1:], NO_TARGET))
