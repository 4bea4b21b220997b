"""The scheduler, run by a model that does nothing: everybody ends, in order, and no step is too large or empty."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from manyhands.config import SamplingConfig
from manyhands.engine.blocks import Blocks
from manyhands.engine.request import Request
from manyhands.engine.scheduler import Scheduler
from manyhands.errors import UserError

SAMPLING = SamplingConfig()


def request(scheduler, number, prompt, new):
    return Request(number, list(range(prompt)), SAMPLING, prompt + new, scheduler.blocks.new_table())


def run(scheduler, cache):
    """One step; `cache` is by request what ids went through the model."""
    order = [r.id for r in (*scheduler.running, *scheduler.waiting)]
    plan = scheduler.schedule()
    assert [r.id for r in (*scheduler.running, *scheduler.waiting)] == order, "first come, first served"
    for r in plan.preempted:
        assert r.num_computed == 0
        cache[r.id] = []
    chosen = [chunk.request for chunk in plan.chunks]
    assert len({r.id for r in chosen}) == len(chosen) and all(r in scheduler.running for r in chosen)
    decoding = [chunk.request.num_waiting == 1 and chunk.request.num_computed > 0 for chunk in plan.chunks]
    assert decoding == sorted(decoding, reverse=True), "those that decode come first"
    for chunk in plan.chunks:
        r, ids = chunk.request, chunk.request.next_ids(chunk.count)
        cache.setdefault(r.id, []).extend(ids)
        assert len(ids) == chunk.count > 0 and r.table.length >= r.num_computed + chunk.count
        draws = chunk.draws
        scheduler.advance(chunk)
        assert cache[r.id] == (r.prompt_ids + r.token_ids)[: r.num_computed]
        if draws:
            r.token_ids.append(1000 + len(r.token_ids))
            if r.num_tokens == r.max_length:
                scheduler.end(r, "length")
    return plan


class Serving(RuleBasedStateMachine):
    """Requests come, steps run, callers go away; 9 blocks of 4 tokens for at most 3 requests, 10 tokens a step."""

    def __init__(self):
        super().__init__()
        self.scheduler = Scheduler(Blocks(9, block_size=4), max_sequences=3, max_batch_tokens=10)
        self.requests, self.cache = [], {}

    @rule(prompt=st.integers(1, 30), new=st.integers(1, 12))
    def add(self, prompt, new):
        asked = request(self.scheduler, len(self.requests), prompt, new)
        if prompt + new - 1 > 36:
            with pytest.raises(UserError, match=r"need 1[01] blocks of 4 tokens; the cache has 9"):
                self.scheduler.add(asked)
        else:
            self.scheduler.add(asked)
            self.requests.append(asked)

    @precondition(lambda self: self.scheduler.busy)
    @rule()
    def step(self):
        plan = run(self.scheduler, self.cache)
        assert 0 < sum(chunk.count for chunk in plan.chunks) <= 10
        assert len(self.scheduler.running) <= 3

    @rule(which=st.integers(0, 100))
    def abort(self, which):
        if self.requests:
            asked = self.requests[which % len(self.requests)]
            before = asked.finish_reason
            self.scheduler.end(asked, "abort")
            assert asked.finish_reason == (before or "abort")

    @invariant()
    def blocks_belong_to_who_runs(self):
        blocks, running = self.scheduler.blocks, self.scheduler.running
        held = [block for r in running for block in r.table.ids]
        assert len(held) == len(set(held)) == blocks.num_used and blocks.num_free + blocks.num_used == 9
        assert all(not r.table.ids for r in self.requests if r not in running)

    def teardown(self):
        first = {}
        for number in range(3000):
            if not self.scheduler.busy:
                break
            for chunk in run(self.scheduler, self.cache).chunks:
                first.setdefault(chunk.request.id, number)
        assert not self.scheduler.busy, "somebody starves"
        assert list(first.values()) == sorted(first.values()) or not first, "started in the order they came in"
        for r in self.requests:
            assert r.finish_reason == "abort" or (r.finish_reason == "length" and r.num_tokens == r.max_length)
        assert self.scheduler.blocks.num_used == 0


TestServing = Serving.TestCase
TestServing.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 9)), min_size=1, max_size=6), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_without_a_budget_no_prompt_is_cut(sizes, rows):
    scheduler = Scheduler(Blocks(1000), max_sequences=rows)
    asked = [request(scheduler, i, *size) for i, size in enumerate(sizes)]
    for r in asked:
        scheduler.add(r)
    steps, cache = [], {}
    while scheduler.busy:
        steps.append([(chunk.request.id, chunk.count) for chunk in run(scheduler, cache).chunks])
    for r in asked:
        counts = [count for step in steps for number, count in step if number == r.id]
        assert counts == [len(r.prompt_ids)] + [1] * (len(r.token_ids) - 1), "each token goes through the model once"
    assert not any(r.num_preemptions for r in asked)


def test_the_youngest_gives_way_and_is_computed_again():
    scheduler = Scheduler(Blocks(4, block_size=2), max_sequences=4)
    old, young = (request(scheduler, i, 3, 4) for i in range(2))
    cache = {}
    for r in (old, young):
        scheduler.add(r)
    plans = []
    while scheduler.busy:
        plans.append(run(scheduler, cache))
    assert [r for plan in plans for r in plan.preempted] == [young]
    assert old.num_preemptions == 0 and young.num_preemptions == 1
    assert len(old.token_ids) == len(young.token_ids) == 4
    assert [chunk.count for plan in plans for chunk in plan.chunks if chunk.request is young] == [3, 1, 5, 1]


def test_a_long_prompt_waits_for_those_that_decode():
    scheduler = Scheduler(Blocks(100), max_sequences=4, max_batch_tokens=8)
    short, long = request(scheduler, 0, 2, 9), request(scheduler, 1, 20, 1)
    scheduler.add(short)
    scheduler.add(long)
    counts, cache = [], {}
    while not long.finish_reason:
        counts.append([(chunk.request.id, chunk.count) for chunk in run(scheduler, cache).chunks])
    assert counts == [[(0, 2), (1, 6)], [(0, 1), (1, 7)], [(0, 1), (1, 7)]]


def test_scheduling_needs_no_torch():
    code = "import sys, manyhands.engine.scheduler; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
