"""Batches: every token is seen, order is a function of the seed alone, and a saved position is exact."""

import itertools
import json

import numpy as np
import pytest
import torch

from manyhands.errors import CheckpointError, ConfigError, DataError
from manyhands.text import PackedBatches, evaluation_batches

TOKENS = np.arange(1000, dtype=np.uint16)  # each token is its own position


def take(batches: PackedBatches, count: int) -> list[torch.Tensor]:
    return list(itertools.islice(batches, count))


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def epoch_of_starts(seed: int, epoch: int) -> list[int]:
    """The sequence starts of one epoch, read off a batch size of one."""
    batches = PackedBatches(TOKENS, 16, 1, seed)
    starts: dict[int, list[int]] = {}
    while batches.epoch <= epoch:
        now = batches.epoch
        starts.setdefault(now, []).append(int(next(batches)[0, 0]))
    return starts[epoch]


def test_shape_type_and_overlap() -> None:
    (ids_BS,) = take(PackedBatches(TOKENS, 16, 4, seed=0), 1)
    assert ids_BS.shape == (4, 17) and ids_BS.dtype == torch.int64
    assert torch.equal(ids_BS, ids_BS[:, :1] + torch.arange(17))


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_an_epoch_is_a_shuffled_partition(epoch: int) -> None:
    starts = epoch_of_starts(seed=3, epoch=epoch)
    ordered = sorted(starts)
    assert starts != ordered
    assert ordered[0] < 16
    assert ordered == list(range(ordered[0], 1000 - 16, 16))  # each target once, at most S - 1 lost at each end


def test_epochs_and_seeds_differ_and_repeat() -> None:
    assert len({tuple(epoch_of_starts(0, epoch)) for epoch in range(4)}) == 4
    assert len({min(epoch_of_starts(0, epoch)) for epoch in range(8)}) > 1  # the offset changes
    assert epoch_of_starts(0, 1) == epoch_of_starts(0, 1) != epoch_of_starts(1, 1)
    assert epoch_of_starts(-1, 0)  # any int is a seed


def test_global_generators_are_neither_read_nor_moved() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = take(PackedBatches(TOKENS, 16, 4, seed=0), 40)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    np.random.seed(1)
    assert equal(first, take(PackedBatches(TOKENS, 16, 4, seed=0), 40))


def test_the_order_is_pinned() -> None:
    """A run resumes on the same data under a later version of NumPy or of this file."""
    assert [int(i) for i in next(PackedBatches(TOKENS, 16, 6, seed=0))[:, 0]] == [175, 47, 319, 207, 31, 943]


def test_a_batch_may_straddle_epochs() -> None:
    batches = PackedBatches(TOKENS, 100, 7, seed=0)  # 9 sequences an epoch
    assert [int(i) for ids in take(batches, 4) for i in ids[:, 0]] == [
        int(next(one)[0, 0]) for one in [PackedBatches(TOKENS, 100, 1, seed=0)] for _ in range(28)
    ]
    assert batches.epoch == 3
    assert take(PackedBatches(TOKENS, 100, 50, seed=0), 1)[0].shape == (50, 101)  # several epochs in one batch


@pytest.mark.parametrize("stop", [0, 1, 14, 15, 16, 31])  # 61 or 62 sequences an epoch: before, at and after its end
def test_resume_is_exact(stop: int) -> None:
    batches = PackedBatches(TOKENS, 16, 4, seed=5)
    take(batches, stop)
    state = json.loads(json.dumps(batches.state_dict()))
    expected = take(batches, 40)
    resumed = PackedBatches(TOKENS, 16, 4, seed=5)
    take(resumed, 3)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert equal(take(resumed, 40), expected)


@pytest.mark.parametrize("world_size", [2, 4])
def test_order_does_not_depend_on_world_size(world_size: int) -> None:
    whole = PackedBatches(TOKENS, 16, 8, seed=0)
    expected = take(whole, 20)
    ranks = [PackedBatches(TOKENS, 16, 8, 0, rank, world_size) for rank in range(world_size)]
    parts = [take(rank, 20) for rank in ranks]
    assert equal([torch.cat(row) for row in zip(*parts, strict=True)], expected)
    assert all(rank.state_dict() == whole.state_dict() for rank in ranks)
    ranks[1].load_state_dict(whole.state_dict())  # one process's position serves any number
    assert torch.equal(next(ranks[1]), next(whole)[8 // world_size : 16 // world_size])


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"sequence_length": 8}, "sequence_length"),
        ({"batch_size": 8}, "batch_size"),
        ({"num_tokens": 999}, "num_tokens"),
        ({"seed": 1}, "seed"),
        ({"index": -1}, "index"),
        ({"index": 62}, "index"),
        ({"epoch": -1}, "epoch"),
        ({"epoch": None}, "epoch"),
        ({"index": "3"}, "index"),
    ],
)
def test_a_position_in_something_else_is_refused(change: dict[str, object], word: str) -> None:
    batches = PackedBatches(TOKENS, 16, 4, seed=0)
    take(batches, 2)
    before = batches.state_dict()
    with pytest.raises(CheckpointError, match=word):
        batches.load_state_dict({**before, **change})
    assert batches.state_dict() == before
    with pytest.raises(CheckpointError):
        batches.load_state_dict({})


def test_too_few_tokens_and_uneven_ranks() -> None:
    with pytest.raises(DataError, match=r"16 tokens are too few.* needs 17"):
        PackedBatches(TOKENS[:16], 16, 4, seed=0)
    assert next(PackedBatches(TOKENS[:17], 16, 4, seed=0)).tolist() == [list(range(17))] * 4
    with pytest.raises(ConfigError, match="batch_size = 4"):
        PackedBatches(TOKENS, 16, 4, seed=0, rank=0, world_size=3)


@pytest.mark.parametrize("count", [2, 16, 17, 18, 100, 1000])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_evaluation_predicts_each_token_once(count: int, batch_size: int) -> None:
    inputs, targets = [], []
    for ids_BS, mask_BS in evaluation_batches(TOKENS[:count], 16, batch_size):
        assert ids_BS.dtype == torch.int64 and mask_BS.dtype == torch.bool
        assert ids_BS.shape == (len(mask_BS), 17) and mask_BS.shape[1] == 16 and len(mask_BS) <= batch_size
        inputs += ids_BS[:, :-1][mask_BS].tolist()
        targets += ids_BS[:, 1:][mask_BS].tolist()
    assert targets == list(range(1, count))
    assert inputs == list(range(count - 1))


def test_evaluation_of_a_part_and_of_nothing() -> None:
    batches = list(evaluation_batches(TOKENS, 16, 4, max_batches=3))
    assert equal(
        [ids for ids, _ in batches], [ids for ids, _ in itertools.islice(evaluation_batches(TOKENS, 16, 4), 3)]
    )
    assert all(mask.all() for _, mask in batches)
    with pytest.raises(DataError, match="1 tokens are too few"):
        evaluation_batches(TOKENS[:1], 16, 4)  # on the call, not on the first batch
