"""Evaluation against plain cross entropy, and that it leaves no trace in the model."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from manyhands.errors import DataError
from manyhands.generate import evaluate
from manyhands.parallel.ranks import Alone
from manyhands.text import evaluation_batches

from ..thread_ranks import on_ranks

TOKENS = np.random.default_rng(0).integers(0, 320, 203)


def naive(model, tokens, sequence_length):
    """Nats of each target and expert counts per layer, sequence by sequence without padding."""
    nats, counts = [], {layer: torch.zeros(4, dtype=torch.long) for layer in model.config.sparse_layers}
    for start in range(0, len(tokens) - 1, sequence_length):
        ids = torch.from_numpy(tokens[start : start + sequence_length + 1])
        with torch.no_grad():
            out = model(ids[None, :-1])
        nats.append(F.cross_entropy(out.logits[0].double(), ids[1:], reduction="none"))
        for layer, routing in out.routings.items():
            counts[layer] += routing.expert_ids.flatten().bincount(minlength=4)
    return torch.cat(nats), counts


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_figures_equal_plain_cross_entropy(model, batch_size):
    nats, counts = naive(model, TOKENS, 16)
    done = []
    result = evaluate(model, evaluation_batches(TOKENS, 16, batch_size), num_bytes=777, progress=done.append)
    assert result.tokens == 202 == len(nats) and done[-1] == 202 and done == sorted(done)
    assert result.loss == pytest.approx(float(nats.mean()), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(float(nats.mean())), rel=1e-4)
    assert result.bits_per_byte == pytest.approx(float(nats.sum()) / math.log(2) / 777, rel=1e-5)
    assert list(result.load) == [1, 2]
    for layer, summary in result.load.items():
        torch.testing.assert_close(torch.tensor(summary.load), counts[layer] / counts[layer].sum())


@pytest.mark.parametrize("ranks", [1, 2])
def test_losses_of_each_document(model, ranks):
    """They are the naive ones, however the text is cut, and their sum is the whole; on several ranks too."""
    ends = np.array([1, 40, 41, 130, 203])
    nats, _ = naive(model, TOKENS, 16)
    document = np.searchsorted(ends, np.arange(1, 203), side="right")
    expected = np.bincount(document, nats.numpy(), minlength=5)

    def work(rank):
        return evaluate(model, evaluation_batches(TOKENS, 16, 3), ranks=rank, ends_X=ends)

    for result in [work(Alone())] if ranks == 1 else on_ranks(2, work):
        assert result.documents.targets_X.tolist() == [0, 39, 1, 89, 73]
        np.testing.assert_allclose(result.documents.nats_X, expected, rtol=1e-4)
        assert result.documents.nats_X.sum() == pytest.approx(result.loss * result.tokens, rel=1e-6)
        assert result.loss == pytest.approx(float(nats.mean()), rel=1e-5)


def test_what_is_given_is_seen_and_not_predicted(model):
    tokens = TOKENS.copy()
    tokens[[0, 50, 51, 120]] = 7
    nats, _ = naive(model, tokens, 16)
    scored = torch.from_numpy(tokens[1:] != 7)
    result = evaluate(model, evaluation_batches(tokens, 16, 3), given=7)
    assert result.tokens == int(scored.sum()) < 202
    assert result.loss == pytest.approx(float(nats[scored].mean()), rel=1e-5)


def test_nothing_about_the_model_changes(make):
    router = {"num_experts": 4, "num_experts_per_tok": 2, "jitter": 0.9, "noisy": True, "bias": True}
    model = make(moe={"router": router})
    expected = evaluate(model, evaluation_batches(TOKENS, 16, 4))
    model.train()
    model.norm.eval()
    loss = model(torch.tensor([[1, 2]])).logits.sum()
    loss.backward()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    modes, rng = [module.training for module in model.modules()], torch.get_rng_state()
    assert evaluate(model, evaluation_batches(TOKENS, 16, 4)) == expected
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert p.requires_grad and (p.grad is None if grad is None else torch.equal(p.grad, grad))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.is_grad_enabled()


def test_the_mode_returns_even_if_the_data_fails(make):
    model = make().train()
    with pytest.raises(DataError, match="token id 320; the model has vocab_size = 320"):
        evaluate(model, evaluation_batches(np.array([1, 2, 320]), 4, 1))
    assert all(module.training for module in model.modules())


def test_compute_dtype(make):
    model = make()
    full = evaluate(model, evaluation_batches(TOKENS, 16, 4))
    half = evaluate(model, evaluation_batches(TOKENS, 16, 4), dtype=torch.bfloat16)
    assert half.loss != full.loss
    assert half.loss == pytest.approx(full.loss, rel=0.05)
    assert full.bits_per_byte is None


def test_a_dense_model_has_no_load(make):
    model = make(moe={"router": {"num_experts": 4, "num_experts_per_tok": 2}})
    dense = type(model)(model.config.model_copy(update={"moe": None}))
    for parameter in dense.parameters():
        torch.nn.init.normal_(parameter)
    assert evaluate(dense, evaluation_batches(TOKENS, 16, 4)).load == {}


def test_a_hopeless_model_has_infinite_perplexity(make):
    model = make()
    model.lm_head.weight.data *= 1e6
    assert evaluate(model, evaluation_batches(TOKENS, 16, 4)).perplexity == math.inf
    model.norm.weight.data.fill_(math.nan)
    assert math.isnan(evaluate(model, evaluation_batches(TOKENS, 16, 4)).perplexity)


def test_what_cannot_be_evaluated(make):
    with pytest.raises(DataError, match="no token to predict"):
        evaluate(make(), [])
    with pytest.raises(DataError, match="sequences of 49 tokens are longer than max_position_embeddings = 48"):
        evaluate(make(), evaluation_batches(TOKENS, 49, 1))
    with pytest.raises(DataError, match="token id -3"):
        evaluate(make(), evaluation_batches(np.array([1, -3, 2]), 4, 1))
