"""Experts ranked by what their absence costs."""

import re

import pytest
import torch

from manyhands.config import ModelConfig
from manyhands.errors import ConfigError, DataError, UserError
from manyhands.inspect.ablate import ablate
from manyhands.models import Decoder, init_weights
from manyhands.moe import Mask

FIELDS = {
    "vocab_size": 24, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "max_position_embeddings": 32,
    "attention": {"num_attention_heads": 2, "head_dim": 8}, "initializer_range": 0.3,
}  # fmt: skip
MOE = {"router": {"num_experts": 4, "num_experts_per_tok": 1, "norm_top1": True}, "moe_intermediate_size": 16}


def make(moe: dict | None = MOE) -> Decoder:
    model = Decoder(ModelConfig(**FIELDS, moe=moe))
    init_weights(model, 0)
    return model.eval()


def texts(model: Decoder, B: int = 12, S: int = 16) -> torch.Tensor:
    """The model's own greedy words after random ones: it predicts them well, as it is."""
    ids = torch.randint(24, (B, 2), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        while ids.shape[1] < S:
            ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), 1)
    return ids


def test_each_rise_is_that_of_the_masked_model() -> None:
    model = make()
    ids = texts(model)
    done: list[int] = []
    found = ablate(model, ids, progress=done.append, batch_size=5)
    assert done == list(range(1, 10)) and found.tokens == 12 * 15 and len(found.experts) == 8
    assert [a.increase for a in found.experts] == sorted((a.increase for a in found.experts), reverse=True)

    def loss(edit: dict | None) -> float:
        with torch.no_grad():
            logits = model(ids[:, :-1], edit=edit).logits.double()
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))

    assert found.loss == pytest.approx(loss(None), abs=1e-5)
    with torch.no_grad():
        routings = model(ids[:, :-1]).routings
    for a in found.experts:
        assert a.increase == pytest.approx(loss({a.layer: Mask((a.expert,))}) - found.loss, abs=1e-5)
        assert a.low <= a.increase <= a.high
        assert a.share == pytest.approx(float((routings[a.layer].expert_ids == a.expert).double().mean()))
    assert found.experts[0].low > 0.01  # what the texts were made with is missed


def test_an_expert_nobody_chose_costs_nothing_and_intervals_are_repeatable() -> None:
    model = make()
    with torch.no_grad():
        model.layers[1].mlp.router.weight[2] = 0.0
        model.layers[1].mlp.router.weight[[0, 1, 3]] = torch.eye(16)[:3] * 50
        ids = texts(model)
    found = ablate(model, ids, experts=[(1, 2), (1, 0)], seed=3)
    assert found == ablate(model, ids, experts=[(1, 2), (1, 0)], seed=3)
    dead = next(a for a in found.experts if a.expert == 2)
    if dead.share == 0.0:
        assert (dead.increase, dead.low, dead.high) == pytest.approx((0.0, 0.0, 0.0), abs=1e-6)


def test_what_cannot_be_ablated_is_one_clear_error() -> None:
    model = make()
    with pytest.raises(DataError, match=re.escape("texts are [1, 9]: an interval needs two texts")):
        ablate(model, torch.zeros(1, 9, dtype=torch.int64))
    with pytest.raises(ConfigError, match="layer 1: there is no expert 4"):
        ablate(model, texts(model), experts=[(1, 4)])
    with pytest.raises(ConfigError, match="there is no router in layer 5"):
        ablate(model, texts(model), experts=[(5, 0)])
    with pytest.raises(UserError, match="no mixture-of-experts layer"):
        ablate(make(None), torch.zeros(2, 9, dtype=torch.int64))
