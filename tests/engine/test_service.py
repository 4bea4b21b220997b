"""Requests from asyncio to an engine on its own thread: as alone, cancelled, too many, drained, their engine dead."""

import asyncio
import threading
import time

import pytest

from manyhands.config import SamplingConfig
from manyhands.engine.asked import Asked, EngineDead, Overloaded, Stopping
from manyhands.engine.engine import Engine
from manyhands.engine.service import Service
from manyhands.errors import ManyhandsError, UserError

GREEDY = SamplingConfig(temperature=0, max_new_tokens=8)
LONG = SamplingConfig(temperature=1, max_new_tokens=40)


@pytest.fixture
def engine(make, tokenizer):
    return Engine(make(max_position_embeddings=64), tokenizer, max_sequences=4)


@pytest.fixture
def service(engine):
    service = Service(engine, max_waiting=4)
    service.start()
    yield service
    service.close()
    assert not service._thread.is_alive()


def slow(engine, seconds=0.01):
    """Each step takes as long."""
    step = engine.step

    def slowly():
        time.sleep(seconds)
        return step()

    engine.step = slowly


async def read(submission):
    return "".join([token.text async for token in submission])


async def until(what, seconds=5.0):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        await asyncio.sleep(0.005)


def test_many_at_once_say_what_each_says_alone(service, engine, make, tokenizer):
    prompts = [f"def f{i}(x):" for i in range(8)]
    alone = [c.text for c in Engine(engine.model, tokenizer).generate(prompts, GREEDY)]

    async def run():
        submissions = [await service.submit(prompt, GREEDY) for prompt in prompts]
        texts = await asyncio.gather(*map(read, submissions))
        assert [s.completion().text for s in submissions] == texts
        return texts

    assert asyncio.run(run()) == alone
    assert service.num_open == service.num_running == service.num_waiting == 0
    assert service.counters.ended == {"length": 8} and service.counters.steps >= 8
    assert engine.scheduler.blocks.num_used == 0


def test_several_of_one_caller_come_with_their_numbers(service):
    async def run():
        seen = [[], []]
        answers = await service.submit_all([Asked("a", GREEDY), Asked([5, 6], GREEDY)])
        async with answers:
            async for number, token in answers.tokens():
                seen[number].append(token.token_id)
        return seen, [s.completion().token_ids for s in answers.submissions]

    seen, made = asyncio.run(run())
    assert seen == made and all(len(ids) == 8 for ids in made)


def test_all_of_a_list_are_taken_or_none(service):
    async def run():
        with pytest.raises(UserError, match="vocab_size"):
            await service.submit_all([Asked("a", GREEDY), Asked([999999], GREEDY)])
        return await read(await service.submit("a", GREEDY))

    assert asyncio.run(run())
    assert service.num_open == 0 and service.counters.ended == {"length": 1}


def test_a_wrong_argument_fails_its_request_alone(service):
    async def run():
        with pytest.raises(ManyhandsError, match="TypeError"):
            await service.submit("a", GREEDY, nonsense=True)
        return await read(await service.submit("a", GREEDY))

    assert asyncio.run(run()) and service.healthy


def test_leaving_early_ends_it_and_frees_its_blocks(service, engine):
    slow(engine)

    async def run():
        submission = await service.submit("a", LONG)
        async for _ in submission:
            break
        await until(lambda: service.num_open == 0)
        return submission.completion()

    completion = asyncio.run(run())
    assert completion.finish_reason == "abort" and len(completion.token_ids) < 40
    assert engine.scheduler.blocks.num_used == 0


def test_a_caller_that_is_gone_before_it_was_taken_leaves_nothing(service, engine):
    slow(engine, 0.05)

    async def run():
        first = await service.submit("a", LONG)
        task = asyncio.ensure_future(service.submit("b", LONG))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        first.cancel()
        await until(lambda: service.num_open == 0)

    asyncio.run(run())
    assert not engine.busy


def test_a_loop_that_has_ended_leaves_nothing(service, engine):
    slow(engine)
    asyncio.run(service.submit("a", LONG))
    end = time.monotonic() + 5
    while service.num_open:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert not engine.busy and service.healthy


def test_more_than_may_wait_are_refused_at_once_and_the_others_end(service, engine):
    slow(engine, 0.03)

    async def run():
        taken = [await service.submit("a", GREEDY) for _ in range(8)]
        begin = time.monotonic()
        with pytest.raises(Overloaded, match="try later"):
            await service.submit("a", GREEDY)
        assert time.monotonic() - begin < 1
        await until(lambda: service.num_waiting == 4)
        texts = await asyncio.gather(*map(read, taken))
        assert await read(await service.submit("a", GREEDY)) == texts[0]
        return texts

    assert len(set(asyncio.run(run()))) == 1
    assert service.counters.refused == {"full": 1}


def test_draining_finishes_what_runs_and_takes_nothing_new(service, engine):
    slow(engine)

    async def run():
        submission = await service.submit("a", GREEDY)
        drained = asyncio.ensure_future(service.drain(30))
        await asyncio.sleep(0)
        with pytest.raises(Stopping):
            await service.submit("b", GREEDY)
        text = await read(submission)
        await drained
        return text, submission.completion().finish_reason

    text, reason = asyncio.run(run())
    assert text and reason == "length"


def test_draining_without_patience_ends_what_runs(service, engine):
    slow(engine, 0.02)

    async def run():
        submission = await service.submit("a", LONG)
        await service.drain(0)
        assert service.num_open == 0
        await read(submission)
        return submission.completion().finish_reason

    assert asyncio.run(run()) == "abort"


def test_a_step_that_does_not_end_holds_nobody_up(engine):
    service, hold, stuck = Service(engine), threading.Event(), threading.Event()
    step = engine.step

    def sticks():
        stuck.set()
        hold.wait(10)
        return step()

    engine.step = sticks
    service.start()

    async def run():
        submission = await service.submit("a", LONG)
        await until(stuck.is_set)
        reading = asyncio.ensure_future(read(submission))
        await service.drain(0)
        with pytest.raises(Stopping):
            await reading

    asyncio.run(run())
    service.close(0.01)
    assert service.stuck
    hold.set()
    service.close()
    assert not service.stuck and not engine.busy


def test_everybody_hears_of_an_engine_that_died(engine):
    service = Service(engine)
    service.start()
    assert service.healthy
    step, go = engine.step, threading.Event()

    def dies():
        if go.is_set():
            raise RuntimeError("out of luck")
        return step()

    engine.step = dies

    async def run():
        submission = await service.submit("a", LONG)
        go.set()
        with pytest.raises(EngineDead, match="out of luck"):
            await read(submission)
        await until(lambda: service.dead)
        with pytest.raises(EngineDead, match="out of luck"):
            await service.submit("a", GREEDY)

    asyncio.run(run())
    assert service.dead and not service.healthy and service.num_open == 0
    service.close()


def test_work_without_a_step_is_not_healthy(engine):
    service, hold, stuck = Service(engine, patience=0.05), threading.Event(), threading.Event()
    step = engine.step

    def sticks():
        stuck.set()
        hold.wait(10)
        return step()

    engine.step = sticks
    service.start()

    async def run():
        submission = await service.submit("a", GREEDY)
        await until(stuck.is_set)
        await until(lambda: not service.healthy)
        hold.set()
        return await read(submission)

    assert asyncio.run(run()) and service.healthy
    service.close()


def test_closing_tells_who_waits(service, engine):
    slow(engine)

    async def run():
        submission = await service.submit("a", LONG)
        service.close()
        with pytest.raises(Stopping):
            await read(submission)

    asyncio.run(run())
    assert not service.dead


def test_experts_are_counted(service, engine):
    async def run():
        return await read(await service.submit([5, 6, 7], GREEDY))

    asyncio.run(run())
    counters = service.counters
    assert set(counters.total.experts) == {1, 2}
    tokens = 3 + 7  # the last one made has not run
    assert all(counts.sum() == tokens * 2 and counts.shape == (4,) for counts in counters.total.experts.values())
    assert counters.total.tokens == tokens and counters.total.made == 8
    assert counters.recent.tokens == tokens and sum(counters.distinct.values()) == counters.steps
