"""Belady against every way there is, and against the policies that do not know the future."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyhands.simulate.belady import NEVER, next_uses, told
from manyhands.simulate.replay import replay
from manyhands.simulate.tokens import Tokens
from manyhands.simulate.wants import Wants
from manyhands.store.policies import Key, policy
from tests.simulate.small import some_tokens

ids = st.lists(
    st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=2), min_size=2, max_size=2), min_size=1, max_size=40
)


def wants_of(chosen: list[list[list[int]]], record_bytes: list[int]) -> Wants:
    T = len(chosen)
    return Wants.of(
        Tokens(
            np.array(chosen, np.uint8), np.arange(T, dtype=np.int32), np.zeros(T, np.int32), np.ones(T, np.bool_), 255
        ),
        record_bytes,
    )


def most_hits(wants: Wants, slots: int) -> int:
    """By trying everything: after each want, any set of what was there or just read that fits."""
    best: dict[frozenset[Key], int] = {frozenset(): 0}
    for number, experts in enumerate(wants.lists()):
        wanted = frozenset((number % len(wants.record_bytes), expert) for expert in experts)
        then: dict[frozenset[Key], int] = {}
        for memory, hits in best.items():
            hits += len(wanted & memory)
            for size in range(min(slots, len(memory | wanted)) + 1):
                for kept in itertools.combinations(sorted(memory | wanted), size):
                    then[frozenset(kept)] = max(hits, then.get(frozenset(kept), 0))
        best = then
    return max(best.values())


@settings(max_examples=25, deadline=None)
@given(chosen=ids.filter(lambda some: len(some) <= 8), slots=st.integers(0, 3))
def test_nothing_hits_more(chosen: list[list[list[int]]], slots: int) -> None:
    wants = wants_of(chosen, [1, 1])
    assert replay(told(slots, wants), wants).all.hits == most_hits(wants, slots)


@settings(max_examples=60, deadline=None)
@given(chosen=ids, slots=st.integers(0, 8))
def test_no_policy_without_the_future_hits_more(chosen: list[list[list[int]]], slots: int) -> None:
    wants = wants_of(chosen, [3, 3])
    best = replay(told(3 * slots, wants), wants).all
    counts = [[sum(expert in token[layer] for token in chosen) for expert in range(4)] for layer in range(2)]
    for name in ("lfu", "lru", "pinned"):
        assert replay(policy(name, 3 * slots, wants.record_bytes, counts), wants).all.hits <= best.hits


@pytest.mark.parametrize("budget", [0, 9, 20, 60, 1000])
def test_the_books_balance(budget: int) -> None:
    """Also with records of several sizes: what is said to be in memory, hit, read and evicted agrees and fits."""
    wants = Wants.of(some_tokens(T=400), sizes := [4, 9, 5])
    chosen = told(budget, wants)
    memory: set[Key] = set()
    for number, experts in enumerate(wants.lists()):
        layer = number % 3
        decision = chosen.want(layer, experts)
        assert list(decision.hits) == [e for e in experts if (layer, e) in memory]
        assert [miss.expert for miss in decision.misses] == [e for e in experts if (layer, e) not in memory]
        for miss in decision.misses:
            assert set(miss.evicted) <= memory and (miss.kept or not miss.evicted)
            memory -= set(miss.evicted)
            if miss.kept:
                memory.add((layer, miss.expert))
            assert sum(sizes[key[0]] for key in memory) <= budget
        assert memory == set(chosen.resident) and chosen.used_bytes == sum(sizes[key[0]] for key in memory)


def test_next_uses() -> None:
    wants = wants_of([[[0, 1], [2, 3]], [[1, 2], [3, 3]], [[0, 1], [2, 0]]], [1, 1])
    assert next_uses(wants).tolist() == [4, 2, 5, 3, 4, NEVER, NEVER, NEVER, NEVER, NEVER, NEVER]


def test_another_future_than_told_is_refused() -> None:
    wants = wants_of([[[0, 1], [2, 3]]], [1, 1])
    with pytest.raises(ValueError, match="told of 2 experts in this want, and it has 1"):
        told(5, wants).want(0, [0])
