"""Cache policies against the slowest way to write them, on random wants."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyhands.errors import ConfigError
from manyhands.store.policies import HALVING_STEPS, Decision, Key, Lfu, Lru, Miss, Pinned, Policy, policy

Pass = list[list[int]]
"""For each layer the distinct experts that a forward pass wants, ascending."""

LAYERS, EXPERTS = 3, 6
COUNTS = [[(5 * layer + 7 * expert) % 11 for expert in range(EXPERTS)] for layer in range(LAYERS)]
layer_want = st.sets(st.integers(0, EXPERTS - 1), min_size=1, max_size=4).map(sorted)
passes = st.lists(st.lists(layer_want, min_size=LAYERS, max_size=LAYERS), max_size=80)
sizes = st.lists(st.integers(1, 5), min_size=LAYERS, max_size=LAYERS)
budgets = st.integers(0, 40)


def every_policy(budget: int, record_bytes: Sequence[int]) -> list[Policy]:
    return [policy(name, budget, record_bytes, COUNTS) for name in ("lfu", "lru", "pinned")]


def replay(chosen: Policy, steps: list[Pass]) -> list[Decision]:
    out = []
    for step in steps:
        out += [chosen.want(layer, experts) for layer, experts in enumerate(step)]
        chosen.end_step()
    return out


class Naive:
    """LRU and LFU by sorting everything at every miss, with counts kept as whole numbers (2 to the halvings)."""

    def __init__(self, kind: str, budget: int, record_bytes: Sequence[int]) -> None:
        self.kind, self.budget, self.sizes = kind, budget, record_bytes
        self.count: dict[Key, int] = {}
        self.last: dict[Key, int] = {}
        self.memory: set[Key] = set()
        self.now = self.steps = self.began = 0

    def want(self, layer: int, experts: Sequence[int]) -> Decision:
        keys = [(layer, expert) for expert in experts]
        missing = [key for key in keys if key not in self.memory]
        order = keys if self.kind == "lfu" else [key for key in keys if key not in missing]
        for key in order:
            self.touch(key)
        misses = []
        for key in missing:
            out = self.victims(key, keys)
            if out is not None:
                self.memory = self.memory - set(out) | {key}
                if self.kind == "lru":
                    self.touch(key)
            misses.append(Miss(key[1], tuple(out or ()), out is not None))
        return Decision(tuple(key[1] for key in keys if key not in missing), tuple(misses))

    def touch(self, key: Key) -> None:
        self.now += 1
        self.last[key] = self.now
        self.count[key] = self.count.get(key, 0) + 2 ** (self.steps // HALVING_STEPS)

    def victims(self, key: Key, wanted: list[Key]) -> list[Key] | None:
        lfu = self.kind == "lfu"
        out: list[Key] = []
        for other in sorted(self.memory - set(wanted), key=lambda k: (self.count[k] if lfu else 0, self.last[k])):
            worth_more = lfu and (self.count[other], self.last[other]) > (self.count[key], self.began)
            if self.used(out) + self.sizes[key[0]] <= self.budget or worth_more:
                break
            out.append(other)
        return out if self.used(out) + self.sizes[key[0]] <= self.budget else None

    def used(self, without: list[Key]) -> int:
        return sum(self.sizes[layer] for layer, expert in self.memory if (layer, expert) not in without)

    def end_step(self) -> None:
        self.steps += 1
        self.began = self.now


@pytest.mark.parametrize(("kind", "ours"), [("lru", Lru), ("lfu", Lfu)])
@settings(max_examples=60, deadline=None)
@given(steps=passes, record_bytes=sizes, budget=budgets)
def test_is_the_naive_policy(
    kind: str, ours: type[Policy], steps: list[Pass], record_bytes: list[int], budget: int
) -> None:
    fast, slow = ours(budget, record_bytes), Naive(kind, budget, record_bytes)
    for step in steps:
        for layer, experts in enumerate(step):
            assert fast.want(layer, experts) == slow.want(layer, experts)
            assert set(fast.resident) == slow.memory
        fast.end_step()
        slow.end_step()


@settings(max_examples=60, deadline=None)
@given(steps=passes, record_bytes=sizes, budget=budgets)
def test_the_books_balance(steps: list[Pass], record_bytes: list[int], budget: int) -> None:
    """What is said to be in memory, hit, read and evicted agrees, and never takes more than the budget."""
    for chosen in every_policy(budget, record_bytes):
        memory: set[Key] = set()
        for step in steps:
            for layer, experts in enumerate(step):
                decision = chosen.want(layer, experts)
                assert list(decision.hits) == [e for e in experts if (layer, e) in memory]
                assert [miss.expert for miss in decision.misses] == [e for e in experts if (layer, e) not in memory]
                for miss in decision.misses:
                    assert set(miss.evicted) <= memory and not {(layer, e) for e in experts} & set(miss.evicted)
                    assert miss.kept or not miss.evicted
                    memory -= set(miss.evicted)
                    if miss.kept:
                        memory.add((layer, miss.expert))
                    assert sum(record_bytes[key[0]] for key in memory) <= budget
                assert memory == set(chosen.resident)
                assert chosen.used_bytes == sum(record_bytes[key[0]] for key in memory)
            chosen.end_step()


@settings(max_examples=30, deadline=None)
@given(steps=passes, record_bytes=sizes, budget=budgets)
def test_equal_wants_give_equal_decisions(steps: list[Pass], record_bytes: list[int], budget: int) -> None:
    for one, two in zip(every_policy(budget, record_bytes), every_policy(budget, record_bytes), strict=True):
        assert replay(one, steps) == replay(two, steps)


def test_room_for_all_reads_each_expert_once() -> None:
    steps = [[[step % EXPERTS], [0, 5], [1, 2, 3]] for step in range(100)]
    for chosen in every_policy(LAYERS * EXPERTS, [1] * LAYERS):
        misses = [miss for decision in replay(chosen, steps) for miss in decision.misses]
        assert len(misses) == EXPERTS + 2 + 3 and all(miss.kept and not miss.evicted for miss in misses)


def test_below_one_cycle_lru_never_hits_and_lfu_does() -> None:
    """Three layers that want the same expert for ever, and room for two: why `lru` is not the default."""
    steps = [[[0], [0], [0]] for _ in range(50)]
    assert sum(len(decision.hits) for decision in replay(Lru(2, [1, 1, 1]), steps)) == 0
    assert sum(len(decision.hits) for decision in replay(Lfu(2, [1, 1, 1]), steps)) == 2 * 49


def test_an_old_habit_fades() -> None:
    """Expert 0 was used 100 times in a row. Without halving, expert 1 would need as many uses to take its place."""
    chosen = Lfu(1, [1])
    replay(chosen, [[[0]]] * 100)
    uses = 0
    while (0, 1) not in chosen.resident:
        replay(chosen, [[[1]]])
        uses += 1
    assert uses <= 2 * HALVING_STEPS


def test_pinned_takes_the_most_used_per_byte() -> None:
    chosen = Pinned(7, [4, 1], [[8, 100], [3, 0]])
    assert chosen.pins == {(0, 1), (1, 0), (1, 1)}  # 25 and 3 uses a byte; (0, 0) has 2 but no longer fits
    first, second = replay(chosen, [[[0, 1], [0]]])
    assert [miss.kept for miss in first.misses] == [False, True] and second.misses[0].kept
    assert replay(chosen, [[[0, 1], [0]]])[0].hits == (1,)


def test_no_budget_bypasses_everything() -> None:
    for chosen in every_policy(0, [1] * LAYERS):
        assert chosen.want(0, [1, 4]) == Decision((), (Miss(1, (), False), Miss(4, (), False)))


def test_misuse_is_named() -> None:
    with pytest.raises(ConfigError, match="no cache policy 'arc': lfu, lru or pinned"):
        policy("arc", 1, [1])
    with pytest.raises(ConfigError, match="needs a trace"):
        policy("pinned", 1, [1])
    with pytest.raises(ConfigError, match="counts are of 1 layers with experts, the model has 2"):
        policy("pinned", 1, [1, 1], [[1]])
    with pytest.raises(ConfigError, match="not -1 and 1"):
        policy("lru", -1, [1])
    with pytest.raises(ConfigError, match="not 1 and 0"):
        policy("lru", 1, [0])
