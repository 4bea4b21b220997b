"""Guessing ahead changes nothing of what a request says, and saves passes where the text repeats itself."""

import pytest
import torch

from manyhands.config import SamplingConfig
from manyhands.engine.engine import Engine
from manyhands.engine.prefix import Prefix
from manyhands.engine.speculate import Lookup
from manyhands.errors import UserError
from manyhands.kernels import native

from ..runtime.test_program import CASES, packed_model
from .conftest import build

needs_native = pytest.mark.skipif(not native.available(), reason=f"no native kernels: {native.missing()}")
LONG = {"max_position_embeddings": 256}
PROMPT = [5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6, 3, 5, 6]
MODELS = {"gqa": "qwen3", "window, sinks, biases": "gpt-oss", "groups, shared": "dots", "latent": "latent"}


class Cycle:
    """A constraint: these tokens again and again, then others too, and `length` in all."""

    def __init__(self, ids, length, V=50):
        self.ids, self.length, self.V, self.made = ids, length, V, 0

    @property
    def finished(self):
        return self.made == self.length

    def allowed(self):
        mask = torch.zeros(self.V, dtype=torch.bool)
        mask[self.ids[self.made % len(self.ids)]] = True
        mask[: 20 if self.made % 11 == 10 else 0] = True
        return mask

    def accept(self, token_id):
        assert not self.finished and bool(self.allowed()[token_id])
        self.made += 1


def counted(engine):
    """The passes it runs, as lists of ids; filled while it runs."""
    passes, run = [], engine.runner.run

    def spy(batch, states=False):
        passes.append(list(batch.ids))
        return run(batch, states)

    engine.runner.run = spy
    return passes


def finish(engine, prompt, sampling, **add):
    """The tokens as they came, the completion, and how many passes."""
    passes = counted(engine)
    request = engine.add(prompt, sampling, **add)
    tokens = []
    while engine.busy:
        tokens += engine.step()
        if request.finish_reason is None:
            assert request.table.length == request.num_computed == request.num_tokens - 1, "as after single passes"
    assert engine.scheduler.blocks.num_used == 0 or "prefix" in add
    return tokens, engine.completion(request), len(passes)


def same_routing(found, right, exact=True):
    assert list(found) == list(right)
    tolerance = {"atol": 0, "rtol": 0} if exact else {"atol": 1e-4, "rtol": 1e-4}
    for layer, routing in right.items():
        assert torch.equal(found[layer].expert_ids, routing.expert_ids)
        for field in ("weights", "scores", "logits"):
            torch.testing.assert_close(
                getattr(found[layer], field), getattr(routing, field), **tolerance, equal_nan=True
            )


def said(completion):
    return completion.token_ids, completion.text, completion.finish_reason, completion.logprobs


SETTINGS = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.7, "seed": 4},
    "sampled of few": {"temperature": 1.3, "seed": 5, "top_k": 3, "top_p": 0.9, "min_p": 0.05, "choice": 2},
    "penalties": {"temperature": 0.0, "repetition_penalty": 1.05, "presence_penalty": 0.2, "frequency_penalty": 0.1},
    "bias, minimum, stop ids": {
        "temperature": 1.0, "seed": 1, "logit_bias": ((5, 9.0), (6, 9.0), (7, 8.0)), "min_new_tokens": 20,
        "stop_token_ids": (5,),
    },
    "logprobs": {"temperature": 0.0, "logprobs": 3},
    "scored": {"temperature": 0.0, "logprobs": 0, "prompt_logprobs": 2},
}  # fmt: skip


@needs_native
@pytest.mark.parametrize("how", SETTINGS)
@pytest.mark.parametrize("name", MODELS)
def test_a_packed_model_says_the_same_bits(name, how):
    model = packed_model({**CASES[MODELS[name]], **LONG}, "int4")
    sampling = SamplingConfig(max_new_tokens=60, **SETTINGS[how])
    _, right, passes = finish(Engine(model), PROMPT, sampling, routing=True)
    for most in (1, 7):
        tokens, found, fewer = finish(Engine(model, speculate=most), PROMPT, sampling, routing=True)
        assert said(found) == said(right) and found.prompt_logprobs == right.prompt_logprobs
        assert [t.token_id for t in tokens] == right.token_ids
        same_routing(found.routings, right.routings)
        assert fewer <= passes and (how != "greedy" or fewer < passes), "guesses are right where the text repeats"


@needs_native
@pytest.mark.parametrize("keep", [False, True])
def test_tokens_have_the_routing_of_the_pass_they_were_drawn_from(keep):
    model = packed_model({**CASES["qwen3"], **LONG}, "int8")
    sampling = SamplingConfig(max_new_tokens=90, temperature=0.0)
    first, right, _ = finish(Engine(model, keep_routing=keep), PROMPT, sampling, routing=True)
    then, found, _ = finish(Engine(model, keep_routing=keep, speculate=5), PROMPT, sampling, routing=True)
    same_routing(found.routings, right.routings)
    assert len(next(iter(found.routings.values())).expert_ids) == len(PROMPT) + 89
    for one, other in zip(then, first, strict=True):
        same_routing(one.routings, other.routings)


@needs_native
@pytest.mark.parametrize("ids", [[5, 6, 7], [5], [11, 12, 13, 14, 15, 16, 17]])
def test_a_constraint_is_asked_and_told_of_every_token_that_counts(ids):
    model = packed_model({**CASES["qwen3"], **LONG}, "int4")
    sampling = SamplingConfig(max_new_tokens=90, temperature=1.5, seed=2, logprobs=1)
    _, right, passes = finish(Engine(model), PROMPT, sampling, constraint=Cycle(ids, 70))
    _, found, fewer = finish(Engine(model, speculate=8), PROMPT, sampling, constraint=Cycle(ids, 70))
    assert said(found) == said(right) and right.finish_reason == "stop" and len(right.token_ids) == 70
    assert fewer < passes // 2


@needs_native
def test_what_was_guessed_wrong_is_found_by_nobody():
    """The same engine goes on with what the first answers left; and keeps its routing."""
    model = packed_model({**CASES["qwen3"], **LONG}, "int4")
    sampled = [SamplingConfig(max_new_tokens=80, temperature=0.9, seed=s) for s in range(3)]
    engine = Engine(model, speculate=20, keep_routing=True)
    prompt = PROMPT * 3
    for sampling in sampled:
        _, right, _ = finish(Engine(model, prefix_caching=False), prompt, sampling, routing=True)
        (found,) = engine.generate([prompt], sampling, routing=True)
        assert said(found) == said(right)
        whole = prompt + found.token_ids
        for more in (whole, [*whole[:-1], 3], [*whole, 5, 6, 7]):
            greedy = SamplingConfig(max_new_tokens=20, temperature=0.0, logprobs=2)
            _, right, _ = finish(Engine(model, prefix_caching=False), more, greedy, routing=True)
            request = engine.add(more, greedy, routing=True)
            while engine.busy:
                engine.step()
            found = engine.completion(request)
            assert said(found) == said(right) and request.num_cached >= 64
            for layer, routing in right.routings.items():
                assert torch.equal(found.routings[layer].expert_ids, routing.expert_ids)
                assert torch.equal(found.routings[layer].weights, routing.weights)


@needs_native
@pytest.mark.parametrize("how", [{}, {"cache_tokens": 128}, {"max_batch_tokens": 3}, {"paged": False}])
def test_beside_others_and_after_preemption(how):
    """Guesses only while one runs: some come and go, and there is not always room."""
    model = packed_model({**CASES["qwen3"], **LONG}, "int4")
    prompts = [PROMPT, PROMPT * 2, PROMPT[::-1]]
    samplings = [SamplingConfig(max_new_tokens=n, temperature=0.6, seed=n) for n in (90, 30, 50)]
    right = [Engine(model).generate([p], s)[0] for p, s in zip(prompts, samplings, strict=True)]
    engine = Engine(model, speculate=30, **how)
    passes = counted(engine)
    requests = [engine.add(prompts[0], samplings[0])]
    for _ in range(30):
        engine.step()
    requests += engine.add_all(prompts[1:], samplings[1:])
    while engine.busy:
        engine.step()
        assert len(passes[-1]) <= how.get("max_batch_tokens", 999)
    assert [said(engine.completion(r)) for r in requests] == [said(r) for r in right]
    assert engine.scheduler.num_preemptions > 0 or "cache_tokens" not in how
    assert engine.scheduler.blocks.num_used == 0


@needs_native
def test_in_a_cache_of_just_enough_blocks():
    model = packed_model({**CASES["qwen3"], **LONG}, "int4")
    sampling = SamplingConfig(max_new_tokens=64 - len(PROMPT) + 1, temperature=0.0)
    right = Engine(model).generate([PROMPT], sampling)
    assert Engine(model, speculate=64, cache_tokens=64).generate([PROMPT], sampling) == right


@pytest.mark.parametrize("paged", [None, True])
def test_a_plain_model_says_the_same_tokens(model, tokenizer, paged):
    for sampling in (SamplingConfig(temperature=0.0, max_new_tokens=99), SamplingConfig(seed=3, max_new_tokens=99)):
        _, right, passes = finish(Engine(model, tokenizer), PROMPT, sampling, routing=True)
        _, found, fewer = finish(Engine(model, tokenizer, speculate=6, paged=paged), PROMPT, sampling, routing=True)
        assert said(found) == said(right) and fewer <= passes
        same_routing(found.routings, right.routings, exact=False)


def test_it_ends_where_it_would(tokenizer):
    """In the midst of right guesses: stop strings, which may begin in one and end in the next; ids; the length."""
    model = build(max_position_embeddings=256)
    free = SamplingConfig(temperature=0.0, max_new_tokens=100, ignore_eos=True)
    right = Engine(model, tokenizer).generate([PROMPT], free)[0]
    assert len(right.token_ids) == 100
    for first in range(20, len(right.text) - 3, 7):
        sampling = free.model_copy(update={"stop": (right.text[first : first + 3],)})
        plain = Engine(model, tokenizer).generate([PROMPT], sampling)
        assert Engine(model, tokenizer, speculate=9).generate([PROMPT], sampling) == plain
    for length in (0, 1, 2, 3, 37, 99):
        sampling = free.model_copy(update={"max_new_tokens": length})
        engine = Engine(model, tokenizer, speculate=64)
        assert engine.generate([PROMPT], sampling)[0].token_ids == right.token_ids[:length]
        assert engine.scheduler.blocks.num_used == 0


def test_a_conversation_goes_on_from_what_counts():
    model = build(max_position_embeddings=256)
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=50)
    for paged in (False, True):
        engine, prefix, ids = Engine(model, speculate=12, paged=paged), Prefix(), list(PROMPT)
        for _ in range(3):
            right = Engine(model).generate([ids], sampling)[0]
            _, found, _ = finish(engine, ids, sampling, prefix=prefix)
            assert found.token_ids == right.token_ids and prefix.ids == ids + found.token_ids[:-1]
            ids += [*found.token_ids, 5, 6]


def test_a_pass_that_breaks_is_computed_again():
    model = build(max_position_embeddings=256)
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=60)
    right = Engine(model).generate([PROMPT], sampling)[0]
    engine = Engine(model, speculate=8)
    request, run, calls = engine.add(PROMPT, sampling), engine.runner.run, []

    def broken(batch, states=False):
        forward = run(batch, states)
        calls.append(len(batch.ids))
        if len(calls) % 5 == 4:
            raise KeyboardInterrupt
        return forward

    engine.runner.run = broken
    while engine.busy:
        try:
            engine.step()
        except KeyboardInterrupt:
            assert request.num_computed == 0
    assert request.token_ids == right.token_ids and max(calls[1:]) > 1


def test_lookup():
    def draft(ids, most):
        lookup = Lookup()
        lookup.read(ids[:2])
        lookup.read(ids[2:])
        assert lookup.length == len(ids)
        return lookup.draft(most)

    assert draft([1, 2, 3, 4, 1, 2], 3) == [3, 4, 1]
    assert draft([1, 2, 3, 9, 2, 3, 8, 1, 2, 3], 1) == [9], "the longest end first"
    assert draft([3, 1, 3, 2, 3], 1) == [2], "its latest place"
    assert draft([1, 2, 3], 4) == draft([], 4) == draft([1], 4) == [], "nothing is known"
    assert draft([7, 7], 4) == [7] * 4 and draft([1, 2, 1, 2, 1], 5) == [2, 1, 2, 1, 2], "on in the draft itself"
    assert draft([7, 7], 0) == draft([7, 7], -1) == []


@pytest.mark.parametrize("speculate", [-1, 65])
def test_refused(speculate):
    with pytest.raises(UserError, match=rf"speculate is {speculate}; it is from 0 to 64"):
        Engine(build(), speculate=speculate)
