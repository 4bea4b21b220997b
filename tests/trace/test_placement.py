"""Placement of experts: against DeepSeek's published example, against trying everything, and what cannot be placed."""

import itertools

import numpy as np
import pytest

from manyhands.errors import ConfigError
from manyhands.trace.placement import Slots, balanced, contiguous, imbalance

PUBLISHED = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
)
"""The load of the example in EPLB's README: two layers of 12 experts."""


def test_deepseeks_published_example() -> None:
    """github.com/deepseek-ai/EPLB, README: 16 replicas, 4 groups, 2 nodes, 8 GPUs."""
    found = balanced(PUBLISHED, devices=8, redundant=4, groups=4, nodes=2)
    assert found.experts_LS.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    fullest = [90 + 132 / 2, 187 / 2 + 172 / 2]  # by hand: experts 0 and 1, experts 6 and 8
    assert found.device_load(PUBLISHED).max(1).tolist() == pytest.approx(fullest)
    assert imbalance(found.device_load(PUBLISHED)).tolist() == pytest.approx([156 / (1033 / 8), 179.5 / (1156 / 8)])


def test_groups_stay_on_their_node() -> None:
    """Hierarchical: a group's experts, copies too, are on one node, so a token limited to M groups reaches M nodes."""
    load = np.random.default_rng(0).random((3, 32)) ** 3
    found = balanced(load, devices=8, redundant=8, groups=8, nodes=4)
    node_of_slot = np.arange(40) // 10
    for experts in found.experts_LS:
        assert all(len(set(node_of_slot[experts // 4 == group])) == 1 for group in range(8))


def test_nodes_that_do_not_divide_groups_are_not_looked_at() -> None:
    load = np.random.default_rng(1).random((2, 12))
    assert np.array_equal(
        balanced(load, 6, 6, groups=3, nodes=2).experts_LS, balanced(load, 6, 6, groups=1, nodes=1).experts_LS
    )


def test_every_expert_lies_somewhere_and_the_busiest_twice() -> None:
    load = np.array([[1.0, 9.0, 1.0, 1.0]])
    found = balanced(load, devices=2, redundant=2)
    assert found.copies.tolist() == [[1, 3, 1, 1]], "9 is 4.5 twice, then 3 thrice"
    assert imbalance(contiguous(1, 4, 2).device_load(load)).tolist() == pytest.approx([10 / 6])
    assert imbalance(found.device_load(load)).tolist() == pytest.approx([7 / 6])


@pytest.mark.parametrize("seed", range(20))
def test_packing_is_near_the_best_possible(seed: int) -> None:
    """Beside the best of all packings of 8 experts onto 2 devices. 4/3 is Graham's bound (1969) without equal sizes."""
    load = np.random.default_rng(seed).random((1, 8)) ** 4
    halves = [load[0, list(four)].sum() for four in itertools.combinations(range(8), 4)]
    best = min(max(half, load.sum() - half) for half in halves)
    found = balanced(load, devices=2).device_load(load).max()
    assert best * (1 - 1e-12) <= found <= 4 / 3 * best


def test_tokens_take_copies_in_turn() -> None:
    """Counted pair by pair: many tokens load devices as `device_load` says, and each goes where its expert lies."""
    rng = np.random.default_rng(2)
    T, L, E, K, R = 4_000, 2, 8, 2, 4
    ids = np.argsort(rng.random((T, L, E)) + np.linspace(0, 1.5, E), axis=-1)[..., :K].astype(np.uint8)
    load = np.stack([np.bincount(ids[:, layer].ravel(), minlength=E) for layer in range(L)])
    slots = balanced(load, R, redundant=4)
    device = slots.device_of(ids, np.arange(T), none=255)
    for layer in range(L):
        on = slots.experts_LS[layer].reshape(R, -1)
        assert all(e in on[d] for e, d in zip(ids[:, layer].ravel(), device[:, layer].ravel(), strict=True))
        counted = np.bincount(device[:, layer].ravel(), minlength=R)
        assert counted == pytest.approx(slots.device_load(load)[layer], rel=0.05)


def test_no_expert_is_on_no_device() -> None:
    ids = np.array([[[3, 255]]], np.uint8)
    assert contiguous(1, 4, 2).device_of(ids, np.arange(1), none=255).tolist() == [[[1, 2]]]


def test_copies_are_numbered_by_their_slots() -> None:
    slots = Slots(np.array([[0, 1, 1, 2, 1, 0]]), devices=3)
    turns = np.arange(4)
    assert slots.device_of(np.full((4, 1, 1), 1), turns, none=9).ravel().tolist() == [0, 1, 2, 0]
    assert slots.device_of(np.full((4, 1, 1), 0), turns, none=9).ravel().tolist() == [0, 2, 0, 2]


def test_an_empty_load_is_balanced() -> None:
    found = balanced(np.zeros((1, 4)), devices=2, redundant=2)
    assert imbalance(found.device_load(np.zeros((1, 4)))).tolist() == [1.0]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"devices": 5}, "5 devices do not divide 12 slots .* 3 redundant ones would do"),
        ({"devices": 4, "nodes": 3}, "3 nodes do not divide 4 devices"),
        ({"devices": 4, "groups": 5}, "5 groups do not divide 12 experts"),
    ],
)
def test_what_cannot_be_placed_says_so(asked: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        balanced(PUBLISHED, **asked)


def test_devices_that_do_not_divide_experts() -> None:
    with pytest.raises(ConfigError, match="5 devices do not divide 12 experts"):
        contiguous(1, 12, 5)
