"""A recorded trace has what ran, pass by pass, and recording it changes no token."""

import asyncio

import numpy as np
import pytest

from manyhands.config import ModelConfig, SamplingConfig
from manyhands.engine.engine import Engine
from manyhands.engine.recording import recorder_for
from manyhands.engine.service import Service
from manyhands.errors import StorageError, UserError
from manyhands.generate.evaluate import evaluate
from manyhands.kernels import native
from manyhands.models import Decoder
from manyhands.text import evaluation_batches
from manyhands.trace.counts import expert_counts
from manyhands.trace.part import Phase
from manyhands.trace.recording import Trace

from .conftest import build

LONG = {"max_position_embeddings": 256}
PROMPTS = [list(range(3, 60)), [5, 6, 7], list(range(3, 90))]
HOW = {
    "at once": {},
    "in chunks": {"max_batch_tokens": 20},
    "without room for all": {"max_batch_tokens": 20, "cache_tokens": 160},
    "two at a time": {"max_sequences": 2},
    "kept": {"keep_routing": True},
}
SAMPLING = SamplingConfig(max_new_tokens=40, temperature=0.0)


def last_of_each(trace: Trace) -> dict[tuple[int, int], tuple[int, list]]:
    """By sequence and position the token and its experts; what ran again stands instead of what ran before."""
    found = {}
    for part in trace.parts():
        for t in range(len(part)):
            place = int(part.sequence[t]), int(part.position[t])
            found[place] = int(part.token_ids[t]), part.expert_ids[t].tolist()
    return found


@pytest.mark.parametrize("how", HOW)
def test_it_is_what_the_requests_saw(tmp_path, how):
    model, passes = build(**LONG), 0
    prompts = [list(range(n, n + 30)) for n in (3, 50, 90)] if "room" in how else PROMPTS
    plain = Engine(model, **HOW[how]).generate(prompts, SAMPLING)
    with recorder_for(model, None, tmp_path / "t", "a test") as recorder:
        engine = Engine(model, **HOW[how], trace=recorder)
        requests = engine.add_all(prompts, SAMPLING, routing=True)
        while engine.busy:
            engine.step()
            passes += engine.ran is not None
        completions = [engine.completion(request) for request in requests]
    assert [c.token_ids for c in completions] == [c.token_ids for c in plain]
    trace = Trace.open(tmp_path / "t")
    assert len(list(trace.steps())) == passes and trace.manifest.layers == (1, 2)
    found = last_of_each(trace)
    for number, (prompt, done) in enumerate(zip(prompts, completions, strict=True)):
        ids = [*prompt, *done.token_ids]
        for position in range(len(ids) - 1):  # the last one never ran
            token, experts = found.pop((number, position))
            assert token == ids[position]
            assert experts == [done.routings[layer].expert_ids[position].tolist() for layer in (1, 2)]
    assert not found
    assert bool(engine.scheduler.num_preemptions) == ("room" in how)


def test_phases_and_what_shared_a_pass(tmp_path):
    model = build(**LONG)
    with recorder_for(model, None, tmp_path / "t", "a test") as recorder:
        Engine(model, max_batch_tokens=40, trace=recorder).generate(PROMPTS[:2], SAMPLING)
    steps = list(Trace.open(tmp_path / "t").steps())
    assert [len(step) for step in steps[:3]] == [40, 20, 2]  # a chunk; the rest of it and the other prompt; decoding
    assert set(steps[0].phase) == set(steps[1].phase) == {Phase.PREFILL} and set(steps[2].phase) == {Phase.DECODE}
    assert steps[1].sequence.tolist() == [0] * 17 + [1] * 3 and steps[1].position.tolist() == [*range(40, 57), 0, 1, 2]


@pytest.mark.skipif(not native.available(), reason="parts are a program's")
def test_a_pass_that_runs_in_parts_is_several_steps(tmp_path, monkeypatch):
    monkeypatch.setattr("manyhands.engine.runner.MOST_AT_ONCE", 16)
    model = build(**LONG)
    with recorder_for(model, None, tmp_path / "t", "a test") as recorder:
        engine = Engine(model, exact=True, trace=recorder)
        engine.generate([PROMPTS[0]], SAMPLING)
    assert [len(step) for step in Trace.open(tmp_path / "t").steps()] == [16, 16, 16, 9] + [1] * 39


def test_tokens_that_were_guessed_ran_too(tmp_path):
    model = build(**LONG)
    prompt, sampling = [3, 4, 5, 6] * 6, SamplingConfig(max_new_tokens=40, temperature=0.0)
    (right,) = Engine(model).generate([prompt], sampling, routing=True)
    with recorder_for(model, None, tmp_path / "t", "a test") as recorder:
        (done,) = Engine(model, speculate=4, trace=recorder).generate([prompt], sampling)
    assert done.token_ids == right.token_ids
    found = last_of_each(Trace.open(tmp_path / "t"))
    for position, token in enumerate([*prompt, *done.token_ids[:-1]]):
        assert found[0, position][0] == token
        assert found[0, position][1] == [right.routings[layer].expert_ids[position].tolist() for layer in (1, 2)]


def test_a_disk_that_refuses_ends_the_recording_and_nothing_else(tmp_path, caplog):
    model = build(**LONG)
    right = Engine(model).generate(PROMPTS, SAMPLING)

    def refuse(**_):
        raise StorageError("cannot write it: No space left on device")

    with recorder_for(model, None, tmp_path / "t", "a test") as recorder:
        recorder.add_arrays = lambda *_, **__: refuse()
        done = Engine(model, trace=recorder).generate(PROMPTS, SAMPLING)
    assert [c.token_ids for c in done] == [c.token_ids for c in right]
    assert caplog.text.count("the trace ends here: cannot write it") == 1


def test_a_model_without_experts_has_no_trace(tmp_path):
    dense = Decoder(ModelConfig(vocab_size=320, hidden_size=32, num_hidden_layers=1, intermediate_size=32, moe=None))
    with pytest.raises(UserError, match="no sparse layer"):
        recorder_for(dense, None, tmp_path / "t", "a test")


def test_a_service_ends_its_trace(tmp_path):
    model = build(**LONG)
    recorder = recorder_for(model, None, tmp_path / "t", "a test")
    service = Service(Engine(model, trace=recorder), closing=recorder.close)
    service.start()

    async def ask():
        submission = await service.submit(PROMPTS[0], SAMPLING)
        return [token.token_id async for token in submission]

    assert len(asyncio.run(ask())) == 40
    service.close(0.1)
    trace = Trace.open(tmp_path / "t")
    assert trace.complete and len(trace) == len(PROMPTS[0]) + 39


@pytest.mark.parametrize("length", [7, 64])
def test_evaluation(tmp_path, length):
    model, ids = build(**LONG), np.random.default_rng(0).integers(3, 300, 200).astype(np.uint16)
    plain = evaluate(model, evaluation_batches(ids, length, 4))
    with recorder_for(model, None, tmp_path / "t", "a test") as recorder:
        traced = evaluate(model, evaluation_batches(ids, length, 4), trace=recorder)
    assert traced == plain
    trace = Trace.open(tmp_path / "t")
    assert len(trace) == traced.tokens
    assert np.array_equal(np.concatenate([p.token_ids for p in trace.parts()]), ids[:-1])
    for at, layer in enumerate((1, 2)):
        counts = expert_counts(trace)[at]
        assert counts.max() / counts.mean() - 1 == pytest.approx(traced.load[layer].max_vio)
    sequence = np.concatenate([p.sequence for p in trace.parts()])
    position = np.concatenate([p.position for p in trace.parts()])
    assert (sequence * length + position == np.arange(len(trace))).all()
