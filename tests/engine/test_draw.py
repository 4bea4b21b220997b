"""What a request asks of its draws: penalties, bias, constraints, log-probabilities; each is its own affair."""

import numpy as np
import pytest
import torch

from manyhands.config import SamplingConfig
from manyhands.engine.adjust import Adjuster
from manyhands.engine.draw import NOTHING_ALLOWED, Wish, draw_all, logprobs_of
from manyhands.engine.engine import Engine
from manyhands.engine.points import point
from manyhands.errors import ManyhandsError

from .conftest import build

V = 320


class Only:
    """A constraint: these tokens, one after the other."""

    def __init__(self, ids):
        self.left = list(ids)

    @property
    def finished(self):
        return not self.left

    def allowed(self):
        mask = torch.zeros(V, dtype=torch.bool)
        mask[self.left[:1]] = True
        return mask

    def accept(self, token_id):
        assert token_id == self.left.pop(0)


@pytest.fixture(scope="module")
def model():
    return build()


def adjusted(logits, prompt=(), made=(), ends=(), constraint=None, **fields):
    adjuster = Adjuster(SamplingConfig(**fields), prompt, ends, constraint)
    for token in made:
        adjuster.push(token)
    return adjuster.apply(logits)


def test_points_are_philox_of_key_and_counter():
    assert point(7, 3, 11) == float(
        np.random.Generator(
            np.random.Philox(key=np.array([7, 3], np.uint64), counter=np.array([11, 0, 0, 0], np.uint64))
        ).random()
    )
    points = {point(seed, choice, at) for seed in (-1, 0, 1) for choice in (0, 1) for at in range(100)}
    assert len(points) == 600 and all(0 <= p < 1 for p in points)
    assert point(0, 0, 0) == 0.011546754286331562  # the same on every machine and in every version


def test_penalties_are_transformers():
    process = pytest.importorskip("transformers.generation.logits_process")
    logits, ids = torch.randn(V, generator=torch.Generator().manual_seed(0)), [3, 4, 4, 9]
    expected = process.RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([ids]), logits[None].clone())[0]
    assert torch.equal(adjusted(logits, ids[:2], ids[2:], repetition_penalty=1.3), expected)


def test_penalties_and_bias_by_their_formulas():
    logits = torch.randn(V)
    found = adjusted(logits, [1, 2], [5, 5, 6], presence_penalty=0.5, frequency_penalty=0.25, logit_bias=((2, -3.0),))
    expected = logits.clone()
    expected[5] -= 0.5 + 2 * 0.25
    expected[6] -= 0.5 + 0.25
    expected[2] -= 3.0
    torch.testing.assert_close(found, expected)
    assert adjusted(logits, ends={7}, min_new_tokens=2)[7] == -torch.inf
    assert adjusted(logits, made=[1, 1], ends={7}, min_new_tokens=2)[7] == logits[7]
    assert torch.equal(adjusted(logits, logit_bias=((V + 3, 5.0),)), logits)


def test_a_row_that_is_wrong_is_wrong_alone():
    logits = torch.randn(3, V)
    logits[1, 4] = torch.nan
    free, nothing = Adjuster(SamplingConfig(), (), (), None), Adjuster(SamplingConfig(), (), (), Only([]))
    how = SamplingConfig(seed=5)
    alone = draw_all(logits[:1], [Wish(how, 9, free)])[0]
    drawn = draw_all(logits, [Wish(how, 9, free), Wish(how, 9, free), Wish(how, 9, nothing)])
    assert drawn[0] == alone and drawn[0].error is None
    assert "NaN" in str(drawn[1].error) and drawn[2].error == NOTHING_ALLOWED


def test_logprobs_are_of_the_raw_logits_and_the_chosen_one_is_the_same_number():
    logits = 3 * torch.randn(2, V)
    found = logprobs_of(logits, [int(logits[0].argmax()), 7], 4)
    expected = logits.log_softmax(-1)
    assert found[0].top[0] == (found[0].token_id, found[0].logprob)
    assert [token for token, _ in found[1].top] == logits[1].topk(4).indices.tolist()
    assert found[1].logprob == expected[1, 7].item()


def test_tokens_are_the_same_alone_in_company_and_after_preemption(model):
    prompts = [[1, 2, 3], [4] * 9, [5, 6], [7, 8, 9, 10]]
    how = [SamplingConfig(seed=i, max_new_tokens=12, temperature=1.5, frequency_penalty=0.3) for i in range(4)]
    alone = [Engine(model).generate([p], h)[0].token_ids for p, h in zip(prompts, how, strict=True)]
    for engine in (Engine(model), Engine(model, max_sequences=2, max_batch_tokens=3), Engine(model, cache_tokens=64)):
        assert [c.token_ids for c in engine.generate(prompts, how)] == alone


def test_choices_differ_and_repeat(model):
    how = [SamplingConfig(seed=3, choice=i, max_new_tokens=12) for i in range(3)]
    first, again = (Engine(model).generate([[1, 2]] * 3, how) for _ in range(2))
    assert [c.token_ids for c in first] == [c.token_ids for c in again]
    assert len({tuple(c.token_ids) for c in first}) == 3


def test_a_constraint_leads_and_ends(model):
    engine = Engine(model)
    one = engine.add([1, 2], SamplingConfig(max_new_tokens=9), constraint=Only([7, 3, 11]))
    other = engine.add([1, 2], SamplingConfig(temperature=0, max_new_tokens=9))
    stuck = engine.add([1, 2], SamplingConfig(max_new_tokens=9), constraint=Only([]))
    while engine.busy:
        engine.step()
    assert one.token_ids == [7, 3, 11] and one.finish_reason == "stop"
    assert stuck.finish_reason == "error" and stuck.error == NOTHING_ALLOWED and stuck.token_ids == []
    assert (
        other.token_ids
        == Engine(model).generate([[1, 2]], SamplingConfig(temperature=0, max_new_tokens=9))[0].token_ids
    )


class Broken(Only):
    """One that raises where it is told to."""

    def __init__(self, where):
        super().__init__([7, 3])
        self.where = where

    def allowed(self):
        return super().allowed() if self.where != "allowed" else 1 / 0

    def accept(self, token_id):
        return super().accept(token_id) if self.where != "accept" else 1 / 0


@pytest.mark.parametrize("where", ["allowed", "accept"])
def test_a_constraint_that_raises_ends_its_own_request(model, where):
    engine, how = Engine(model), SamplingConfig(temperature=0, max_new_tokens=5)
    bad, good = engine.add([1, 2], how, constraint=Broken(where)), engine.add([1, 2], how)
    while engine.busy:
        engine.step()
    assert bad.finish_reason == "error" and "ZeroDivisionError" in bad.error
    assert good.token_ids == Engine(model).generate([[1, 2]], how)[0].token_ids


def test_an_end_token_that_the_vocabulary_lacks(model):
    how = SamplingConfig(max_new_tokens=3, min_new_tokens=2, stop_token_ids=(1 << 20,))
    assert len(Engine(model).generate([[1]], how)[0].token_ids) == 3


def test_logprobs_of_prompt_and_answer(model):
    ids = list(range(1, 40))
    how = SamplingConfig(temperature=0, max_new_tokens=5, logprobs=2, prompt_logprobs=0)
    found = Engine(model, max_batch_tokens=7).generate([ids, ids[:5]], how)
    whole = ids + found[0].token_ids
    with torch.no_grad():
        expected = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    assert found[0].prompt_logprobs[0] is None and len(found[0].prompt_logprobs) == len(ids)
    got = [said.logprob for said in (*found[0].prompt_logprobs[1:], *found[0].logprobs)]
    want = [expected[i, token].item() for i, token in enumerate(whole[1:])]
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    assert [said.token_id for said in found[0].logprobs] == found[0].token_ids
    assert all(said.top[0] == (said.token_id, said.logprob) and len(said.top) == 2 for said in found[0].logprobs)
    assert found[1].prompt_logprobs[1:] != [] and Engine(model).generate([ids], SamplingConfig())[0].logprobs is None


def test_no_new_tokens_score_the_prompt_up_to_the_whole_context(model):
    limit = model.config.max_position_embeddings
    how = SamplingConfig(max_new_tokens=0, prompt_logprobs=1)
    found = Engine(model).generate([[1] * limit, [3]], how)
    assert [c.finish_reason for c in found] == ["length", "length"] and found[0].token_ids == []
    assert all(said is not None for said in found[0].prompt_logprobs[1:]) and found[1].prompt_logprobs == [None]


def test_stop_tokens_and_a_shortest_answer(model):
    greedy = Engine(model).generate([[1, 2]], SamplingConfig(temperature=0, max_new_tokens=8))[0].token_ids
    stop = greedy[3]
    first = greedy.index(stop)
    how = SamplingConfig(temperature=0, max_new_tokens=8, stop_token_ids=(stop,))
    found = Engine(model).generate([[1, 2]], how)[0]
    assert found.token_ids == greedy[: first + 1] and found.finish_reason == "stop"
    assert found.stop_reason == stop
    longer = Engine(model).generate([[1, 2]], how.model_copy(update={"min_new_tokens": first + 1}))[0].token_ids
    assert stop not in longer[: first + 1]


def test_generate_says_what_went_wrong(model):
    broken = build()
    with torch.no_grad():
        broken.norm.weight.fill_(torch.nan)
    with pytest.raises(ManyhandsError, match="NaN"):
        Engine(broken).generate([[1, 2]], SamplingConfig(max_new_tokens=2))
