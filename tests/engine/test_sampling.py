"""Sampling: transformers' filters, exact edges, and draws that follow the distribution."""

import math

import pytest
import torch

from manyhands.config import parse
from manyhands.engine.points import point
from manyhands.engine.sampling import filter_logits
from manyhands.errors import ConfigError, ManyhandsError
from manyhands.generate import SamplingConfig, sample

PROBABILITY = [0.15, 0.5, 0.05, 0.3]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def points(seed):
    return [point(seed, 0, position) for position in range(40_000)]


def kept(**fields):
    logits = filter_logits(torch.tensor(PROBABILITY).log(), SamplingConfig(**{"temperature": 1.0, **fields}))
    return logits.isfinite().nonzero().flatten().tolist()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [None, 1, 7, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.2, 1e-4])
@pytest.mark.parametrize("min_p", [0.0, 0.05, 1.0])
def test_filters_equal_transformers(temperature, top_k, top_p, min_p):
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = 3 * torch.randn(32, 200, generator=seeded())
    warpers = [process.TemperatureLogitsWarper(temperature)] if temperature != 1.0 else []
    warpers += [process.TopKLogitsWarper(top_k)] if top_k else []
    warpers += [process.TopPLogitsWarper(top_p)] if top_p < 1.0 else []
    warpers += [process.MinPLogitsWarper(min_p)] if min_p else []
    expected = logits
    for warper in warpers:
        expected = warper(torch.empty(32, 0, dtype=torch.long), expected)
    config = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    actual = filter_logits(logits, config)
    assert torch.equal(actual.isfinite(), expected.isfinite())
    torch.testing.assert_close(actual.softmax(-1), expected.softmax(-1))


def test_each_filter_on_four_tokens():
    assert kept() == [0, 1, 2, 3]
    assert kept(top_k=2) == [1, 3]
    assert kept(top_p=0.45) == [1]  # the first token alone crosses 0.45, and stays
    assert kept(top_p=0.7) == [1, 3]
    assert kept(top_p=0.81) == [0, 1, 3]
    assert kept(min_p=0.2) == [0, 1, 3]  # 0.05 / 0.5 is less than 0.2
    assert kept(min_p=0.31) == [1, 3]
    assert kept(min_p=1.0) == [1]
    assert kept(top_k=3, top_p=0.8) == [1, 3]  # top-p after top-k: 0.8 of the remaining 0.95


def test_equal_tokens_are_cut_at_the_lower_index():
    logits = filter_logits(torch.zeros(8), SamplingConfig(top_p=0.6))
    assert logits.isfinite().tolist() == [True] * 5 + [False] * 3


def test_greedy_takes_the_lowest_of_equals():
    logits = torch.zeros(3, 5000)
    logits[0, [4000, 17]] = 2.0
    logits[1, 4999] = 1.0
    for temperature in (0.0, 1e-9):
        assert sample(logits, SamplingConfig(temperature=temperature), 0.5).tolist() == [17, 4999, 0]
    assert sample(logits[0], SamplingConfig(temperature=0), 0.5).shape == ()


def test_draws_follow_the_distribution_and_the_seed():
    logits = torch.tensor(PROBABILITY).log().expand(40_000, 4)
    config = SamplingConfig(temperature=0.5)
    ids = sample(logits, config, points(3))
    squared = torch.tensor(PROBABILITY) ** 2
    torch.testing.assert_close(ids.bincount(minlength=4) / 40_000, squared / squared.sum(), atol=0.01, rtol=0)
    assert torch.equal(ids, sample(logits, config, points(3)))
    assert not torch.equal(ids, sample(logits, config, points(4)))
    assert set(sample(logits, SamplingConfig(top_k=2), points(0)).tolist()) == {1, 3}


def test_extreme_logits_and_temperatures_stay_finite():
    logits = torch.tensor([[1e30, -1e30, -math.inf, 0.0]])
    for temperature in (2e-6, 1.0, 1e6):
        assert sample(logits, SamplingConfig(temperature=temperature, top_p=0.9, min_p=0.1), 0.999).item() == 0
    assert sample(torch.full((1, 4), 7.0).bfloat16(), SamplingConfig(top_p=0.01), 0.0).item() == 0


@pytest.mark.parametrize("bad", [[0.0, math.nan], [0.0, math.inf], [-math.inf, -math.inf]])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(bad, temperature):
    with pytest.raises(ManyhandsError, match="NaN or infinite"):
        sample(torch.tensor([[1.0, 2.0], bad]), SamplingConfig(temperature=temperature), 0.5)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"seed": 1 << 63},
        {"max_new_tokens": -1},
        {"repetition_penalty": 0.0},
        {"presence_penalty": 2.1},
        {"frequency_penalty": -2.1},
        {"logit_bias": [[3, 101]]},
        {"logit_bias": [[-1, 1]]},
        {"stop_token_ids": [-1]},
        {"logprobs": 21},
        {"prompt_logprobs": -1},
        {"choice": -1},
        {"stop": [""]},
        {"topp": 0.5},
    ],
)
def test_what_makes_no_sense_is_refused(fields):
    with pytest.raises(ConfigError, match=next(iter(fields))):
        parse(SamplingConfig, fields)
