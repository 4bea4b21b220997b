"""Expert choice and hash routing, and who is causal (§9)."""

import pytest
import torch

from manyhands.config import RouterConfig
from manyhands.errors import ConfigError

from .make_routing import make_layer, make_router, tokens


@pytest.mark.parametrize(("T", "E", "c"), [(16, 4, 2), (32, 8, 1), (12, 4, 3)])
def test_each_expert_takes_exactly_its_share(T: int, E: int, c: int) -> None:
    routing = make_router(num_experts=E, num_experts_per_tok=c, select="expert_choice")(tokens(T, 8))
    assert routing.kept.sum(0).tolist() == [T * c // E] * E
    assert torch.equal(routing.expert_counts(), routing.kept.sum(0))
    assert routing.kept.sum(1).min() < routing.kept.sum(1).max(), "tokens get different numbers of experts"


def test_experts_take_their_best_tokens_at_the_weight_of_their_score() -> None:
    routing = make_router(num_experts=4, num_experts_per_tok=2, select="expert_choice")(tokens(16, 8))
    for e in range(4):
        best = routing.scores[:, e].topk(8).indices.sort().values
        assert torch.equal(routing.kept[:, e].nonzero().flatten(), best)
        assert (routing.expert_ids[best, e] == e).all()
    assert torch.equal(routing.weights, routing.scores)


def test_expert_choice_never_takes_padding() -> None:
    router, x = make_router(num_experts=4, num_experts_per_tok=2, select="expert_choice"), tokens(12, 8)
    alone = router(x[:8])
    padded = router(x, torch.tensor([True] * 8 + [False] * 4))
    assert not padded.kept[8:].any() and torch.equal(padded.kept[:8], alone.kept)
    nobody = router(x, torch.zeros(12, dtype=torch.bool))
    assert not nobody.kept.any()


def test_expert_choice_output_is_the_weighted_sum() -> None:
    layer, x = make_layer(router={"num_experts": 4, "select": "expert_choice"}), tokens(8, 8)
    y, routing = layer(x)
    dense = torch.stack([layer.experts(x, only(routing, e)) for e in range(4)]).sum(0)
    torch.testing.assert_close(y, dense)


def only(routing, e: int):
    from dataclasses import replace

    kept = torch.zeros_like(routing.kept)
    kept[:, e] = routing.kept[:, e]
    return replace(routing, kept=kept)


def test_hash_sends_the_same_id_to_the_same_expert() -> None:
    router = make_router(num_experts=8, num_experts_per_tok=1, select="hash")
    ids = torch.tensor([5, 9, 5, 9, 5, 4095])
    routing = router(tokens(6, 8), None, ids)
    e = routing.expert_ids[:, 0]
    assert e[0] == e[2] == e[4] and e[1] == e[3] and (e >= 0).all() and (e < 8).all()
    assert torch.equal(router(tokens(6, 8, seed=9), None, ids).expert_ids, routing.expert_ids), "x has no say"
    assert torch.equal(routing.weights, torch.ones(6, 1)) and not routing.weights.requires_grad


@pytest.mark.parametrize("E", [2, 7, 8, 64])
def test_hash_spreads_neighbouring_ids(E: int) -> None:
    router = make_router(num_experts=E, num_experts_per_tok=1, select="hash")
    counts = router(tokens(4096, 8), None, torch.arange(4096)).expert_counts().double()
    assert counts.max() / counts.mean() < 1.3
    first = router(tokens(4 * E, 8), None, torch.arange(4 * E)).expert_counts()
    assert first.max() <= 10, "the most frequent ids do not share an expert"


def test_hash_without_ids_says_so() -> None:
    with pytest.raises(ConfigError, match="token_ids"):
        make_router(num_experts=4, num_experts_per_tok=1, select="hash")(tokens(3, 8))


CAUSAL = [
    {},
    {"num_experts_per_tok": 1},
    {"score": "sigmoid", "bias": True, "n_group": 2, "topk_group": 1},
    {"noisy": True},
    {"jitter": 0.1, "random_second": True},
    {"capacity_factor": 1.0},  # limits training only
    {"select": "hash", "num_experts_per_tok": 1},
]


@pytest.mark.parametrize("fields", CAUSAL)
def test_prefix_is_unchanged_by_later_tokens(fields: dict) -> None:
    layer = make_layer(router={"num_experts": 4, **fields}).eval()
    assert layer.router.config.causal_safe
    x, ids = tokens(12, 8), torch.arange(12)
    other = torch.cat((x[:7], tokens(5, 8, seed=77)))
    y, routing = layer(x, None, ids)
    changed, rerouted = layer(other, None, torch.cat((ids[:7], ids[7:] + 50)))
    assert torch.equal(routing.expert_ids[:7], rerouted.expert_ids[:7])
    torch.testing.assert_close(changed[:7], y[:7], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("fields", [{"select": "expert_choice"}, {"eval_capacity_factor": 1.0, "min_capacity": 1}])
def test_routers_that_are_not_causal_say_so_and_are_not(fields: dict) -> None:
    """Prepend the later tokens' influence: with other tokens behind (or before), somebody's routing changes."""
    config = RouterConfig(num_experts=4, **fields)
    assert not config.causal_safe
    layer = make_layer(router={"num_experts": 4, **fields}).eval()
    x = tokens(12, 8)
    changed = False
    for seed in range(20):
        other = torch.cat((x[:7], 3 * tokens(5, 8, seed=seed), 3 * tokens(6, 8, seed=seed + 50)))
        changed = changed or not torch.equal(layer(x)[1].kept[:7], layer(other)[1].kept[:7])
    assert changed
