"""Many requests at once, each as it is alone, however they come, are cut, share room and end."""

import itertools

import numpy as np
import pytest
import torch

from manyhands.config import SamplingConfig
from manyhands.engine.engine import Engine
from manyhands.engine.prefix import Prefix
from manyhands.engine.runner import Runner
from manyhands.errors import UserError

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [42], [100, 3, 100], list(range(30, 52)), [7] * 13]
SAMPLINGS = [
    SamplingConfig(temperature=0, max_new_tokens=12),
    SamplingConfig(temperature=1.5, seed=3, max_new_tokens=20),
    SamplingConfig(temperature=2.0, top_k=9, seed=4, max_new_tokens=3),
    SamplingConfig(temperature=2.0, top_p=0.8, seed=5, max_new_tokens=17, stop=("e", "f(")),
    SamplingConfig(temperature=1.0, min_p=0.01, seed=6, max_new_tokens=1),
]


def said(completions):
    return [(c.text, c.token_ids, c.finish_reason) for c in completions]


@pytest.fixture
def alone(model, tokenizer):
    """What each is by itself."""
    return said([Engine(model, tokenizer).generate([p], s)[0] for p, s in zip(PROMPTS, SAMPLINGS, strict=True)])


HOW = {
    "together": {},
    "two at a time": {"max_sequences": 2},
    "in chunks": {"max_batch_tokens": 5},
    "paged": {"paged": True},
    "paged, in chunks, without room for all": {"paged": True, "max_batch_tokens": 7, "cache_tokens": 64},
    "in one piece each, without room for all": {"cache_tokens": 64},
}


@pytest.mark.parametrize("how", HOW)
def test_requests_of_all_sorts_are_each_as_alone(model, tokenizer, alone, how):
    engine = Engine(model, tokenizer, **HOW[how])
    completions = engine.generate(PROMPTS, SAMPLINGS)
    assert said(completions) == alone
    assert not engine.busy and engine.scheduler.blocks.num_used == 0


def test_a_preempted_request_says_the_same(model, tokenizer):
    prompts, sampling = [list(range(20 + i, 50 + i)) for i in range(3)], SamplingConfig(seed=1, max_new_tokens=17)
    alone = said([Engine(model, tokenizer).generate([p], sampling)[0] for p in prompts])
    for paged in (False, True):
        engine = Engine(model, tokenizer, paged=paged, cache_tokens=128)
        requests = [engine.add(p, sampling, routing=True) for p in prompts]
        while engine.busy:
            engine.step()
        completions = [engine.completion(r) for r in requests]
        assert said(completions) == alone
        assert [r.num_preemptions > 0 for r in requests] == [False, False, True]
        for prompt, completion in zip(prompts, completions, strict=True):
            ran = len(prompt) + len(completion.token_ids) - 1
            assert {r.expert_ids.shape for r in completion.routings.values()} == {(ran, 2)}


def test_who_comes_later_disturbs_nobody_and_who_ends_leaves_at_once(model, tokenizer, alone):
    engine, requests, beside = Engine(model, tokenizer), [], []
    arrivals = dict(zip((0, 2, 3, 9, 11), zip(PROMPTS, SAMPLINGS, strict=True), strict=True))
    for number in itertools.count():
        if number in arrivals:
            requests.append(engine.add(*arrivals[number]))
        if not engine.busy and number > max(arrivals):
            break
        tokens = engine.step()
        beside.append(len(tokens))
        assert {t.request for t in tokens if t.finish_reason}.isdisjoint(engine.scheduler.running)
    assert said(map(engine.completion, requests)) == alone
    assert max(beside) >= 3


def test_the_seed_is_the_requests_own(make, tokenizer):
    engine, seeds = Engine(make(), tokenizer), [1, 1, 2]
    one, same, other = engine.generate(["def"] * 3, [SamplingConfig(seed=s, max_new_tokens=20) for s in seeds])
    assert said([one]) == said([same]) != said([other])


def test_routing_is_of_every_token_that_ran(model, tokenizer):
    engine = Engine(model, tokenizer, max_batch_tokens=6)
    completions = engine.generate(PROMPTS, SAMPLINGS, routing=True)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        ids = [*prompt, *completion.token_ids[:-1]]
        with torch.no_grad():
            out = model(torch.tensor([ids]))
        assert list(completion.routings) == list(out.routings) == [1, 2]
        for layer, routing in completion.routings.items():
            assert torch.equal(routing.expert_ids, out.routings[layer].expert_ids)
            torch.testing.assert_close(routing.weights, out.routings[layer].weights, atol=1e-4, rtol=1e-4)
    assert engine.generate([[1]], SAMPLINGS[0])[0].routings == {}


def test_a_stream_tells_whose_token_it_is(model, tokenizer, alone):
    engine = Engine(model, tokenizer)
    texts = [""] * len(PROMPTS)
    for number, token in engine.stream(PROMPTS, SAMPLINGS):
        assert {r.expert_ids.shape for r in token.routings.values()} == {(1, 2)}
        texts[number] += token.text
    assert texts == [text for text, _, _ in alone]


def test_a_stream_that_is_closed_ends_its_own_alone(make, tokenizer):
    engine = Engine(make(), tokenizer)
    other = engine.add([9, 8, 7], SamplingConfig(max_new_tokens=6))
    stream = engine.stream([[1, 2], [3]], SamplingConfig(max_new_tokens=20))
    next(stream)
    stream.close()
    assert engine.scheduler.running == [other]
    while engine.busy:
        engine.step()
    assert said([engine.completion(other)]) == said(
        Engine(make(), tokenizer).generate([[9, 8, 7]], SamplingConfig(max_new_tokens=6))
    )


def test_an_aborted_request_is_gone(make, tokenizer):
    engine = Engine(make(), tokenizer, max_sequences=1)
    running, waiting = (engine.add([1, 2, i], SamplingConfig(max_new_tokens=5)) for i in (3, 4))
    engine.step()
    engine.abort(running)
    engine.abort(waiting)
    assert not engine.busy and engine.step() == []
    first, second = engine.completion(running), engine.completion(waiting)
    assert len(first.token_ids) == 1 and second.token_ids == []
    assert first.finish_reason == second.finish_reason == "abort"


def test_a_pass_cut_short_is_run_again(model, tokenizer, alone, monkeypatch):
    engine = Engine(model, tokenizer)
    requests = engine.add_all(PROMPTS, SAMPLINGS, routing=True)
    block, calls = type(model.layers[1]), []

    def interrupted(self, *args):
        calls.append(self)
        if len(calls) in (2, 20):
            raise KeyboardInterrupt
        return forward(self, *args)

    forward = block.forward
    monkeypatch.setattr(block, "forward", interrupted)
    stops = 0
    while engine.busy:
        try:
            engine.step()
        except KeyboardInterrupt:
            stops += 1
    completions = [engine.completion(request) for request in requests]
    assert said(completions) == alone and 1 <= stops <= 2
    assert completions[0].routings[1].expert_ids.shape[0] == 7 + 11


def test_a_prefix_goes_from_one_request_to_the_next(model, monkeypatch):
    engine, prefix, counts = Engine(model), Prefix(), []
    run = Runner.run
    monkeypatch.setattr(Runner, "run", lambda self, batch: (counts.append(batch.num_tokens), run(self, batch))[1])
    first = engine.add(PROMPTS[0], SAMPLINGS[0], prefix=prefix)
    while engine.busy:
        engine.step()
    counts.clear()
    longer = [*PROMPTS[0], *first.token_ids, 60, 61]
    second = engine.add(longer, SAMPLINGS[0], prefix=prefix)
    while engine.busy:
        engine.step()
    assert counts[0] == 3 and second.token_ids == Engine(model).generate([longer], SAMPLINGS[0])[0].token_ids


def test_what_cannot_be_is_refused_and_nothing_is_left(make, tokenizer):
    engine = Engine(make(), cache_tokens=32)
    with pytest.raises(UserError, match="a prompt is text: generating with it needs a tokenizer"):
        engine.generate(["text"])
    with pytest.raises(UserError, match="2 prompts and 1 sampling settings"):
        engine.generate([[1], [2]], [SamplingConfig()])
    with pytest.raises(UserError, match=r"give \[prompt\] for one"):
        Engine(make(), tokenizer).generate("text")
    with pytest.raises(UserError, match="need 2 blocks of 32 tokens; the cache has 1: ask for fewer new tokens"):
        engine.generate([[1], [1] * 30], SamplingConfig(max_new_tokens=10))
    assert not engine.busy
    assert len(engine.generate([[1] * 30], SamplingConfig(max_new_tokens=3, temperature=0))[0].token_ids) == 3


def test_a_prompt_of_other_than_integers_is_refused_and_any_kind_of_integer_taken(make):
    engine, greedy = Engine(make()), SamplingConfig(temperature=0, max_new_tokens=3)
    for wrong in ([1.0, 2], [[1, 2]], ["1"], [None], torch.ones(2, 2), torch.ones(3)):
        with pytest.raises(UserError, match="a prompt is text or a list of token ids"):
            engine.add(wrong, greedy)
    assert not engine.busy
    long = [i % 9 for i in range(40)]
    kinds = [engine.generate([kind], greedy)[0].token_ids for kind in (long, torch.tensor(long), np.array(long))]
    assert kinds[0] == kinds[1] == kinds[2]
