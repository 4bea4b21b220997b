"""Packing: every row whole and once in an epoch, no sequence overfull, few of them; a position resumes exactly."""

from pathlib import Path

import numpy as np
import pytest
import torch

from manyhands.errors import CheckpointError, ConfigError, DataError
from manyhands.text.packing import RowBatches, best_fit, in_order
from manyhands.text.pairs import NO_TARGET
from manyhands.text.row_file import RowFile, beside, write_rows
from manyhands.text.targets import Example


def lengths(count: int, longest: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(2, longest + 2, count).tolist()


@pytest.fixture
def rows(tmp_path: Path) -> RowFile:
    """40 rows of 2 to 17 tokens; a row's tokens are its number; every other is a target."""
    made = []
    for number, n in enumerate(lengths(40, 16)):
        learnt = np.arange(n) % 2 == 1
        made.append(Example("x", np.full(n, number, np.uint32), learnt))
    write_rows(tmp_path / "train.npy", made, 300)
    return RowFile.open(tmp_path / "train.npy", 300)


@pytest.mark.parametrize("seed", range(5))
def test_best_fit_is_best_fit_decreasing(seed: int) -> None:
    """Against the definition, row by row; and not far from what any packing needs."""
    room, places = 50, lengths(200, 50, seed)
    places = [n - 1 for n in places]
    left: list[int] = []
    for need in sorted(places, reverse=True):
        fits = [r for r in left if r >= need]
        if fits:
            left[left.index(min(fits))] -= need
        else:
            left.append(room - need)
    bins = best_fit(places, room)
    assert sorted(room - sum(places[i] for i in bin) for bin in bins) == sorted(left)
    assert sorted(i for bin in bins for i in bin) == list(range(200))
    assert max(sum(places[i] for i in bin) for bin in bins) <= room
    assert len(bins) <= 11 / 9 * -(-sum(places) // room) + 1


@pytest.mark.parametrize("packed", [True, False])
def test_an_epoch_has_every_row_once(rows: RowFile, packed: bool) -> None:
    batches = RowBatches(rows, 16, 1, seed=3, packed=packed)
    epochs: list[list[int]] = [[], []]
    while (epoch := batches.walk.epoch) < 2:
        (batch,) = [next(batches)]
        assert len(batch) == 1 and sum(batch.lengths) <= 16 and (packed or len(batch.rows) == 1)
        for read, labels in batch.rows:
            number = int(read[0])
            n = int(rows.lengths[number])
            assert read.tolist() == [number] * (n - 1)
            assert labels.tolist() == [number if i % 2 == 0 else NO_TARGET for i in range(n - 1)]
            epochs[epoch].append(number)
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(40)) and epochs[0] != epochs[1]


@pytest.mark.parametrize("packed", [True, False])
def test_a_position_goes_on_exactly_and_ranks_share(rows: RowFile, packed: bool) -> None:
    def take(batches: RowBatches, count: int) -> list[list[list[int]]]:
        return [[[int(read[0]) for read, _ in sequence] for sequence in next(batches).sequences] for _ in range(count)]

    whole = take(RowBatches(rows, 16, 4, 1, packed=packed, sha256="a"), 30)  # several epochs
    first = RowBatches(rows, 16, 4, 1, packed=packed, sha256="a")
    take(first, 13)
    parts = []
    for rank in range(2):
        mine = RowBatches(rows, 16, 4, 1, rank, 2, packed=packed, sha256="a")
        mine.load_state_dict(first.state_dict())
        parts.append(take(mine, 17))
    assert [one + two for one, two in zip(*parts, strict=True)] == whole[13:]
    for other in (
        RowBatches(rows, 16, 4, 1, packed=not packed, sha256="a"),
        RowBatches(rows, 16, 4, 1, packed=packed, sha256="b"),
    ):
        with pytest.raises(CheckpointError, match=r"packed|sha256"):
            other.load_state_dict(first.state_dict())
    with pytest.raises(ConfigError, match="not divisible by the 3 processes"):
        RowBatches(rows, 16, 4, 1, 0, 3)
    with pytest.raises(DataError, match="a row of 17 tokens is longer"):
        RowBatches(rows, 15, 4, 1)


def test_validation_is_always_the_same(rows: RowFile) -> None:
    for packed in (True, False):
        one, two = (list(in_order(rows, 16, 4, packed)) for _ in range(2))
        assert [b.lengths for b in one] == [b.lengths for b in two]
        assert sum(b.targets for b in one) == int(rows.learnt.sum()) and sum(len(b.rows) for b in one) == 40


def test_parts_and_pictures_of_a_batch(rows: RowFile) -> None:
    batch = next(RowBatches(rows, 16, 4, 1))
    parts = batch.split(2)
    assert [len(part) for part in parts] == [2, 2] and sum(p.targets for p in parts) == batch.targets
    assert batch.split(None)[0].lengths == batch.lengths
    ids, labels = batch.in_a_row()
    padded, real, asked = batch.padded()
    assert torch.equal(padded[real], ids[0]) and torch.equal(asked[real], labels[0])
    assert (asked[~real] == NO_TARGET).all() and real.sum() == sum(batch.lengths) < real.numel()


DAMAGE = {
    "targets gone": lambda path: beside(path)[0].unlink(),
    "starts are no numbers": lambda path: np.save(beside(path)[1], np.zeros(41, bool)),
    "starts of another file": lambda path: np.save(beside(path)[1], np.arange(0, 90, 2)),
    "no target": lambda path: np.save(beside(path)[0], np.zeros_like(np.load(beside(path)[0]))),
    "all targets": lambda path: np.save(beside(path)[0], np.ones_like(np.load(beside(path)[0]))),
    "half a file": lambda path: beside(path)[0].write_bytes(beside(path)[0].read_bytes()[:90]),
    "a pickle": lambda path: np.save(beside(path)[0], np.asarray([None], dtype=object)),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_are_refused(rows: RowFile, tmp_path: Path, name: str) -> None:
    del rows
    DAMAGE[name](tmp_path / "train.npy")
    with pytest.raises(DataError, match=r"train(\.targets|\.starts)?\.npy: "):
        RowFile.open(tmp_path / "train.npy", 300)
