"""Fast paths fail closed: what a config asks for is computed or refused, for every field there is."""

from typing import Any, Literal, get_args

import pytest
import torch
from torch.nn.functional import softplus

from manyhands.config import AttentionConfig, ModelConfig, MoEConfig, RopeConfig, RouterConfig
from manyhands.errors import ConfigError
from manyhands.kernels import ExpertWeights, choose, native
from manyhands.kernels.native.backend import supports_native
from manyhands.moe import Router, router
from manyhands.runtime.claims import route
from manyhands.runtime.coverage import Coverage
from manyhands.runtime.covered import ATTENTION, MIXTURE, MODEL, ROPE

ALL = {
    "route": route.COVERED,
    "attention": ATTENTION,
    "mixture": MIXTURE,
    "model": MODEL,
    "rope": ROPE,
}
NOT_COMPUTED = {
    "route": {"eval_capacity_factor", "capacity_tokens", "bias_on", "mixer_epsilon", "slots_per_expert"},
    "attention": {"attention_chunk_size", "nope_layers", "floor_scale", "attn_scale"},
    "mixture": {"unchosen", "average_decay", "weigh"},
    "model": {"kind"},
    "rope": {"short_factor", "long_factor", "short_mscale", "long_mscale"},
}
"""Fields of today whose other values go the reference's way. A new field lands here or in the fast path, by hand."""


def default(coverage: Coverage) -> Any:
    return coverage.of()


@pytest.mark.parametrize("name", ALL)
def test_every_field_is_computed_or_refused(name: str) -> None:
    coverage = ALL[name]
    assert coverage.covers(default(coverage))
    assert set(coverage.fields) <= set(coverage.of.model_fields)
    assert set(coverage.of.model_fields) - set(coverage.fields) == NOT_COMPUTED[name]
    for field in NOT_COMPUTED[name]:
        assert not coverage.covers(default(coverage).model_copy(update={field: 0.75}))


@pytest.mark.parametrize("name", ALL)
def test_every_value_of_a_choice_is_named(name: str) -> None:
    """A choice added to a `Literal` is refused: a choice is covered by its values, never as a whole."""
    coverage = ALL[name]
    for field, info in coverage.of.model_fields.items():
        if isinstance(getattr(default(coverage), field), str) and field in coverage.fields and field not in FREE:
            assert coverage.fields[field] is not None, field
            assert not coverage.covers(default(coverage).model_copy(update={field: "something new"}))
            assert set(coverage.fields[field] or ()) <= set(get_args(info.annotation))
    if "layer_types" in coverage.fields:
        new = default(coverage).model_copy(update={"layer_types": ("full_attention", "chunked_attention")})
        assert not coverage.covers(new)


FREE = {"init", "drop_policy", "capacity_per"}
"""Choices that act where the fast path does not run."""


@pytest.mark.parametrize("name", ALL)
def test_a_config_with_more_in_it_is_refused(name: str) -> None:
    of: Any = ALL[name].of
    assert ALL[name].of in (RouterConfig, AttentionConfig, MoEConfig, ModelConfig, RopeConfig)

    class Own(of):
        alibi: bool = False

    assert not ALL[name].covers(Own()) and not ALL[name].covers(Own(alibi=True))
    sneaked = of()
    object.__setattr__(sneaked, "__dict__", {**sneaked.__dict__, "alibi": True})
    assert not ALL[name].covers(sneaked)


class SoftplusConfig(RouterConfig):
    score: Literal["softmax", "sigmoid", "softplus"] = "softmax"  # type: ignore[assignment]


@pytest.mark.parametrize("tokens", [1, 16, 17, 5000])
@pytest.mark.parametrize("subclass", [True, False])
@torch.no_grad()
def test_a_score_added_the_natural_way(tokens: int, subclass: bool, monkeypatch) -> None:
    known = router.score

    def score(logits_TE: torch.Tensor, config: RouterConfig) -> torch.Tensor:
        return softplus(logits_TE) if config.score == "softplus" else known(logits_TE, config)

    monkeypatch.setattr(router, "score", score)
    config = SoftplusConfig(score="softplus") if subclass else RouterConfig().model_copy(update={"score": "softplus"})
    layer = Router(config, 32).eval()
    layer.weight.normal_()
    x = torch.randn(tokens, 32)
    routing = layer(x)
    torch.testing.assert_close(routing.scores, softplus(x @ layer.weight.T))
    best = routing.scores.topk(2).values
    torch.testing.assert_close(routing.weights, best / best.sum(-1, keepdim=True))


@torch.no_grad()
def test_a_score_nobody_wrote_is_refused() -> None:
    layer = Router(RouterConfig().model_copy(update={"score": "softplus"}), 32).eval()
    for tokens in (1, 17):
        with pytest.raises(ConfigError, match="score = 'softplus'"):
            layer(torch.randn(tokens, 32))


@torch.no_grad()
@pytest.mark.parametrize("part", ["select", "forward"])
def test_a_router_of_ones_own_is_asked(part: str) -> None:
    class Last(Router):
        def select(self, scores_TE: torch.Tensor) -> torch.Tensor:
            return super().select(-scores_TE)

    layer = Last(RouterConfig(), 32).eval()
    layer.weight.normal_()
    x = torch.randn(4, 32)
    assert torch.equal(layer(x).expert_ids, layer(x.repeat(5, 1)).expert_ids[:4])


@torch.no_grad()
def test_router_weights_of_another_dtype_are_not_read_as_float32() -> None:
    """`load_state_dict(assign=True)` of a checkpoint in bfloat16 replaces float32 weights."""
    layer = Router(RouterConfig(), 32).eval()
    state = {k: torch.randn(v.shape, dtype=torch.bfloat16) for k, v in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)
    with pytest.raises(RuntimeError, match="dtype"):  # as the reference does
        layer(torch.randn(2, 32))


def test_an_activation_the_kernels_do_not_know_goes_elsewhere() -> None:
    x, up, down = torch.randn(3, 16), torch.randn(2, 16, 16), torch.randn(2, 16, 16)
    weights = ExpertWeights(up, down, None, None, "relu_squared")
    assert not supports_native(x, weights) and choose(x, weights) != "native"
    with pytest.raises(ConfigError, match="relu_squared"):
        native.Native()(
            x, torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1), torch.ones(3, 1, dtype=torch.bool), weights
        )
