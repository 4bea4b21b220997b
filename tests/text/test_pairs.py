"""Pairs of sequences: padding is marked, the decoder reads its labels one later, and a saved position is exact."""

import itertools
import json

import pytest
import torch

from manyhands.errors import CheckpointError, ConfigError, DataError
from manyhands.text.pairs import NO_TARGET, PairBatch, PairBatches, pad_pairs

PAIRS = [([row + 10] * (row % 5 + 1), [row + 50] * (row % 3 + 1)) for row in range(23)]


def rows(batches: PairBatches, count: int) -> list[list[list[int]]]:
    return [[batch.ids_BS.tolist(), batch.labels_BT.tolist()] for batch in itertools.islice(batches, count)]


def test_padding() -> None:
    batch = pad_pairs([([5, 6, 1], [7, 1]), ([8], [9, 9, 1])], pad_id=3)
    assert batch.ids_BS.tolist() == [[5, 6, 1], [8, 3, 3]]
    assert batch.mask_BS.tolist() == [[True] * 3, [True, False, False]]
    assert batch.labels_BT.tolist() == [[7, 1, NO_TARGET], [9, 9, 1]]
    assert batch.target_mask_BT.tolist() == [[True, True, False], [True] * 3]
    assert batch.decoder_ids(0, 3).tolist() == [[0, 7, 1], [0, 9, 9]]
    assert pad_pairs([([5], [6]), ([5], [6, 7, 8])], 3).decoder_ids(2, 3).tolist() == [[2, 6, 3], [2, 6, 7]]
    assert batch.labels_BT.tolist() == [[7, 1, NO_TARGET], [9, 9, 1]]  # decoder_ids made a copy


def test_parts_have_no_more_padding_than_they_need() -> None:
    batch = pad_pairs([([5, 6, 1], [7, 1]), ([8], [9]), ([4, 4], [9, 9, 1])])
    parts = batch.split(2)
    assert [part.ids_BS.tolist() for part in parts] == [[[5, 6, 1], [8, 0, 0]], [[4, 4]]]
    assert [part.labels_BT.tolist() for part in parts] == [[[7, 1], [9, NO_TARGET]], [[9, 9, 1]]]
    assert sum(int(part.mask_BS.sum()) for part in parts) == 6


def test_every_epoch_has_every_pair_once() -> None:
    batches = PairBatches(PAIRS, 1, seed=4)
    epochs = [[int(next(batches).ids_BS[0, 0]) for _ in PAIRS] for _ in range(3)]
    assert all(sorted(epoch) == [row + 10 for row in range(23)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize("stop", [0, 5, 6, 13])
def test_resume_is_exact_on_any_number_of_ranks(stop: int) -> None:
    batches = PairBatches(PAIRS, 4, seed=1, sha256="b" * 64)
    rows(batches, stop)
    state = json.loads(json.dumps(batches.state_dict()))
    expected = [pair for read, written in rows(batches, 9) for pair in zip(read, written, strict=True)]
    halves = [PairBatches(PAIRS, 4, 1, rank=rank, world_size=2, sha256="b" * 64) for rank in range(2)]
    for half in halves:
        half.load_state_dict(state)
    found = []
    for _ in range(9):
        for half in halves:
            batch: PairBatch = next(half)
            found += list(zip(batch.ids_BS.tolist(), batch.labels_BT.tolist(), strict=True))
    real = [([t for t in a if t], [t for t in b if t != NO_TARGET]) for a, b in expected]
    assert [([t for t in a if t], [t for t in b if t != NO_TARGET]) for a, b in found] == real


def test_what_cannot_be_is_said() -> None:
    for nothing in ([], [([], [1])], [([1], [])]):
        with pytest.raises(DataError, match="at least one token"):
            pad_pairs(nothing)
    with pytest.raises(DataError, match="no pairs"):
        PairBatches([], 4, seed=0)
    with pytest.raises(ConfigError, match="batch_size = 4"):
        PairBatches(PAIRS, 4, seed=0, world_size=3)
    batches = PairBatches(PAIRS, 4, seed=0)
    with pytest.raises(CheckpointError, match="num_pairs"):
        batches.load_state_dict({**batches.state_dict(), "num_pairs": 22})


def test_to_a_device_keeps_everything() -> None:
    batch = pad_pairs(PAIRS).to("meta")
    assert {x.device.type for x in (batch.ids_BS, batch.mask_BS, batch.labels_BT)} == {"meta"}
    assert torch.equal(pad_pairs(PAIRS).to("cpu").ids_BS, pad_pairs(PAIRS).ids_BS)
