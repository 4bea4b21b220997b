"""The scheduler with a prefix cache and a model that only stores: what a request finds is its own text."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from manyhands.config import SamplingConfig
from manyhands.engine.blocks import Blocks
from manyhands.engine.request import Request
from manyhands.engine.scheduler import AGEING, MOST_PRIORITY, Scheduler
from manyhands.errors import UserError

SAMPLING = SamplingConfig()
SIZE = 4


class Served:
    """A scheduler and what lies in its blocks."""

    def __init__(self, num_blocks, sequences=3, budget=10):
        self.scheduler = Scheduler(Blocks(num_blocks, SIZE), sequences, budget, caching=True)
        self.requests, self.stored, self.ran = [], {}, []

    def add(self, prompt, new, **fields):
        table = self.scheduler.blocks.new_table()
        request = Request(len(self.requests), prompt, SAMPLING, len(prompt) + new, table, **fields)
        self.scheduler.add(request)
        self.requests.append(request)
        return request

    def step(self):
        plan = self.scheduler.schedule()
        assert not {c.request.id for c in plan.chunks} & {r.id for r in plan.preempted}
        for chunk in plan.chunks:
            r, first, draws = chunk.request, chunk.request.num_computed, chunk.draws
            assert not r.table.copies, "what is shared is full, and nobody writes to it"
            for p, token in enumerate(r.next_ids(chunk.count), first):
                self.stored[r.table.ids[p // SIZE], p % SIZE] = (r.salt, token)
            self.scheduler.advance(chunk)
            text = [(r.salt, token) for token in r.ids(0, r.num_computed)]
            assert [self.stored[r.table.ids[p // SIZE], p % SIZE] for p in range(r.num_computed)] == text
            if draws:
                r.token_ids.append(7 + len(r.token_ids) % 2)
                if r.num_tokens == r.max_length:
                    self.scheduler.end(r, "length")
        self.ran.append([(c.request.id, c.count) for c in plan.chunks])
        return plan

    def all(self):
        while self.scheduler.busy:
            assert len(self.ran) < 5000, "somebody starves"
            assert self.step().chunks, "a step does something"
        return self.ran


TEXTS = st.tuples(st.integers(0, 2), st.integers(1, 30), st.integers(0, 1))


class Sharing(RuleBasedStateMachine):
    """Requests of three texts, cut and turned anywhere; 9 blocks for at most 3 requests, 10 tokens a step."""

    def __init__(self):
        super().__init__()
        self.served = Served(9)

    @rule(text=TEXTS, new=st.integers(1, 12), salt=st.sampled_from(["", "x"]), most=st.sampled_from([0, 9, 999]),
          priority=st.integers(-1, 1))  # fmt: skip
    def add(self, text, new, salt, most, priority):
        which, length, end = text
        prompt = [*([which] * (length - 1)), 50 + end]
        if length + new - 1 > 36:
            with pytest.raises(UserError, match=r"need 1[01] blocks of 4 tokens; the cache has 9"):
                self.served.add(prompt, new)
        else:
            self.served.add(prompt, new, salt=salt, most_shared=most, priority=priority)

    @precondition(lambda self: self.served.scheduler.busy)
    @rule()
    def step(self):
        plan = self.served.step()
        assert 0 < sum(chunk.count for chunk in plan.chunks) <= 10
        assert len(self.served.scheduler.running) <= 3

    @rule(which=st.integers(0, 100))
    def abort(self, which):
        if self.served.requests:
            self.served.scheduler.end(self.served.requests[which % len(self.served.requests)], "abort")

    @rule()
    def other_weights(self):
        self.served.scheduler.epoch += 1

    @precondition(lambda self: self.served.scheduler.running)
    @rule()
    def cut_short(self):
        self.served.scheduler.put_back(self.served.scheduler.running[-1])

    @invariant()
    def blocks_belong_to_who_runs(self):
        blocks, running = self.served.scheduler.blocks, self.served.scheduler.running
        held = [block for r in running for block in r.table.ids]
        assert len(set(held)) == blocks.num_used and blocks.num_free + blocks.num_used == 9
        assert all(blocks.holders(block) == held.count(block) for block in held)
        assert all(len(set(r.table.ids)) == len(r.table.ids) for r in running)
        assert all(not r.table.ids for r in self.served.requests if r not in running)
        assert all(r.num_cached <= min(r.most_shared, len(r.prompt_ids) - 1) for r in self.served.requests)

    def teardown(self):
        self.served.all()
        for r in self.served.requests:
            assert r.finish_reason == "abort" or (r.finish_reason == "length" and r.num_tokens == r.max_length)
        assert self.served.scheduler.blocks.num_used == 0


TestSharing = Sharing.TestCase
TestSharing.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


def test_the_longest_beginning_that_was_computed_is_not_computed_again():
    served = Served(100, budget=None)
    served.add([1] * 11, 6)
    served.all()
    made = served.requests[0].token_ids
    cases = {
        "the same": ([1] * 11, 8),
        "two blocks and all of them cached": ([1] * 8, 4),
        "what was made too": ([1] * 11 + made, 16),
        "other from the start": ([2] + [1] * 10, 0),
        "other in the second block": ([1] * 4 + [2] * 9, 4),
        "another's": ([1] * 11, 0),
    }
    for name, (prompt, cached) in cases.items():
        served.ran.clear()
        request = served.add(prompt, 1, salt="x" if name == "another's" else "")
        served.all()
        assert (request.num_cached, served.ran) == (cached, [[(request.id, len(prompt) - cached)]]), name


def test_copies_of_a_prompt_wait_for_the_first_and_run_what_is_left():
    served = Served(100, sequences=8, budget=8)
    copies = [served.add([3] * 21, 2) for _ in range(4)]
    other = served.add([4] * 6, 1)
    served.all()
    assert served.ran[:3] == [[(0, 8)], [(0, 8)], [(0, 5), (other.id, 3)]], "others do not wait for it"
    assert served.ran[3] == [(0, 1), (other.id, 3), (1, 1), (2, 1), (3, 1)]
    assert [r.num_cached for r in copies] == [0, 20, 20, 20]
    assert [len(r.token_ids) for r in copies] == [2] * 4


def test_who_was_preempted_finds_what_nobody_needed():
    served = Served(7, budget=None)
    old, young = served.add([1] * 9, 12), served.add([2] * 9, 9)
    served.all()
    assert (old.num_preemptions, young.num_preemptions) == (0, 1) and served.scheduler.num_preemptions == 1
    counts = [count for step in served.ran for number, count in step if number == young.id]
    assert counts[0] == 9 and 1 < max(counts[1:]) <= 2 * SIZE, "not all of it a second time"
    assert young.num_cached == 0, "what it had computed itself is not what it found"


def test_priority_is_served_first_and_whoever_waits_is_served_in_the_end():
    served = Served(100, sequences=1, budget=None)
    served.add([1], 2)
    served.step()
    low, usual, high = served.add([2], 1, priority=1), served.add([3], 1), served.add([4], 1, priority=-1)
    served.all()
    assert [number for ((number, _),) in served.ran] == [0, 0, high.id, usual.id, low.id]
    low = served.add([5], 1, priority=2)
    steps = 0
    while not low.finish_reason:  # somebody more important comes in every step
        served.add([6], 1)
        served.step()
        steps += 1
    assert 2 * AGEING <= steps <= 2 * AGEING + 2
    for priority in (MOST_PRIORITY + 1, -MOST_PRIORITY - 1):
        with pytest.raises(UserError, match=f"priority is {priority}; it is from -100 to 100"):
            served.add([1], 1, priority=priority)
