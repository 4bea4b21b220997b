"""Sequences of different lengths in one pass without padding: each as it is alone, for every kind of attention."""

import pytest
import torch

from manyhands.errors import ConfigError

from .tiny_models import ATTENTION, ids, tiny

TOL = {"rtol": 0.0, "atol": 1e-5}


@torch.no_grad()
@pytest.mark.parametrize("attention", list(ATTENTION))
@pytest.mark.parametrize("score", [{}, {"select": "hash", "num_experts_per_tok": 1}])
def test_rows_are_each_as_alone(attention: str, score: dict) -> None:
    """Prompts, chunks of prompts and single tokens beside each other."""
    model, x = tiny(attention, router=score).eval(), ids(B=3, S=20)
    caches, done, states, experts = [model.new_cache() for _ in range(3)], [0, 0, 0], [[], [], []], [[], [], []]
    for counts in ((7, 3), (1, 5, 12), (1, 1, 1), (4, 1, 2), (7, 10, 5)):
        parts = [x[b, done[b] : done[b] + n] for b, n in enumerate(counts)]
        hidden = model.hidden_rows(torch.cat(parts)[None], counts, caches[: len(counts)])
        assert hidden.states.shape == (1, sum(counts), 32)
        for b, part in enumerate(hidden.states[0].split(list(counts))):
            states[b].append(part)
            experts[b].append(hidden.routings[1].expert_ids.split(list(counts))[b])
            done[b] += counts[b]
    assert done == [cache.length for cache in caches] == [20, 20, 20]
    for b in range(3):
        right = model.hidden(x[b : b + 1])
        torch.testing.assert_close(torch.cat(states[b]), right.states[0], **TOL)
        assert torch.equal(torch.cat(experts[b]), right.routings[1].expert_ids)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["gqa", "window", "mla"])
def test_a_row_may_have_had_padding(attention: str) -> None:
    model, x = tiny(attention).eval(), ids(B=2, S=12)
    padded, plain = model.new_cache(), model.new_cache()
    mask = torch.ones(1, 9, dtype=torch.bool)
    mask[0, 2:6] = False
    model(x[:1, :9], mask, padded)
    model(x[1:, :9], cache=plain)
    hidden = model.hidden_rows(torch.cat((x[0, 9:], x[1, 9:]))[None], [3, 3], [padded, plain])
    real = torch.cat((x[0, :2], x[0, 6:]))[None]
    torch.testing.assert_close(hidden.states[0, :3], model.hidden(real).states[0, -3:], **TOL)
    torch.testing.assert_close(hidden.states[0, 3:], model.hidden(x[1:]).states[0, -3:], **TOL)


def test_a_cache_of_another_model_is_refused() -> None:
    model = tiny().eval()
    with pytest.raises(ConfigError, match="not the model's 3 layers"):
        model.hidden_rows(ids(B=1), [12], [tiny(num_hidden_layers=2).new_cache()])
