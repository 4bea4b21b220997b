"""All initialisation: scales, seeds, the routers' own rules."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from manyhands.config import AttentionConfig, ModelConfig, MoEConfig, RouterConfig
from manyhands.layers.feed_forward import FeedForward
from manyhands.layers.linear import Linear
from manyhands.layers.norm import RMSNorm
from manyhands.models import Decoder, init_weights
from manyhands.moe import Experts, MoELayer, Router
from manyhands.train.fresh import seed_noise


def model(router: dict | None = None, **moe) -> Decoder:
    config = ModelConfig(
        vocab_size=512,
        hidden_size=256,
        num_hidden_layers=2,
        intermediate_size=256,
        attention=AttentionConfig(num_attention_heads=4, attention_bias=True, output_bias=True, qk_norm="head"),
        moe=MoEConfig(
            router=RouterConfig(**(router or {})), moe_intermediate_size=64, expert_bias=True, n_shared_experts=1, **moe
        ),
    )
    m = Decoder(config)
    with torch.no_grad():
        for t in m.state_dict().values():
            t.fill_(float("nan"))
    init_weights(m, seed=0)
    return m


def test_everything_is_filled_with_its_scale() -> None:
    m = model({"bias": True, "noisy": True}, shared_expert_gate=True)
    for name, t in m.state_dict().items():
        assert torch.isfinite(t).all(), name
        if "norm" in name:
            assert (t == 1).all(), name
        elif name.endswith("bias") or "noise_weight" in name:
            assert (t == 0).all(), name
        else:
            residual = any(part in name for part in ("o_proj", "down_proj"))
            expected = 0.02 / math.sqrt(4) if residual else 0.02
            assert t.std().item() == pytest.approx(expected, rel=0.15), name


def test_switch_router_is_a_tenth_and_truncated() -> None:
    """σ = √(0.1/fan-in), cut at ±2σ, which leaves a standard deviation of 0.88σ."""
    m = model({"init": "switch", "num_experts": 64})
    weight, sigma = m.layers[0].mlp.router.weight, math.sqrt(0.1 / 256)
    assert weight.abs().max().item() <= 2 * sigma
    assert weight.std().item() == pytest.approx(0.8796 * sigma, rel=0.03)


def test_zeros_router() -> None:
    assert torch.count_nonzero(model({"init": "zeros"}).layers[0].mlp.router.weight) == 0


def test_seed_decides_and_nothing_else_does() -> None:
    torch.manual_seed(1)
    one = model().state_dict()
    torch.manual_seed(2)
    two = model()
    assert all(torch.equal(one[n], t) for n, t in two.state_dict().items())
    before = torch.get_rng_state()
    init_weights(two, seed=5)
    assert torch.equal(torch.get_rng_state(), before), "the global generator is left alone"
    assert not torch.equal(two.embed_tokens.weight, one["embed_tokens.weight"])


def test_tied_head_is_the_embedding() -> None:
    tied = Decoder(ModelConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, tie_word_embeddings=True))
    init_weights(tied, 0)
    assert tied.head_weight is tied.embed_tokens.weight and "lm_head.weight" not in tied.state_dict()
    out = tied(torch.tensor([[1, 2, 3]]))
    torch.testing.assert_close(out.logits, tied.hidden(torch.tensor([[1, 2, 3]])).states @ tied.embed_tokens.weight.T)


MOE = MoEConfig(
    moe_intermediate_size=32,
    n_shared_experts=1,
    shared_expert_gate=True,
    expert_bias=True,
    router=RouterConfig(num_experts=8, num_experts_per_tok=2, bias=True, logit_bias=True, noisy=True),
)
PARTS: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: MoELayer(MOE, 64),
    "router": lambda: Router(MOE.router, 64),
    "experts": lambda: Experts(MOE, 64),
    "linear": lambda: Linear(64, 64),
    "feed-forward": lambda: FeedForward(64, 96, "swiglu"),
    "norm": lambda: RMSNorm(64, 1e-6),
    "decoder": lambda: Decoder(ModelConfig(vocab_size=64, hidden_size=64, num_hidden_layers=2, moe=MOE)),
}


@pytest.mark.parametrize("name", PARTS)
def test_a_module_alone_is_initialised(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty  # memory as it may come: full of what was there before

    def dirty(*shape: Any, **options: Any) -> Tensor:
        t = empty(*shape, **options)
        return t.fill_(1e9) if t.is_floating_point() and t.device.type != "meta" else t

    monkeypatch.setattr(torch, "empty", dirty)
    module = PARTS[name]()
    for _, tensor in [*module.named_parameters(), *module.named_buffers()]:
        assert tensor.abs().max() <= 5.0
        assert tensor.ndim < 2 or not tensor.any() or 0.005 < tensor.std() < 0.03
    monkeypatch.undo()  # it would not hear of the device below
    with torch.device("meta"):
        assert all(p.device.type == "meta" for p in PARTS[name]().parameters())


def test_reset_parameters_draws_anew() -> None:
    layer = MoELayer(MOE, 64)
    before = {name: p.clone() for name, p in layer.named_parameters()}
    layer.reset_parameters()
    for name, p in layer.named_parameters():
        if p.ndim > 1 and not name.endswith(("bias", "noise_weight")):
            assert (p != before[name]).any(), name


def test_the_readmes_layer_computes() -> None:
    moe = MoELayer(MoEConfig(router=RouterConfig(num_experts=8, num_experts_per_tok=2)), hidden_size=512)
    y, routing = moe(torch.randn(4, 10, 512))
    assert y.isfinite().all() and y.std() > 1e-4
    assert moe.router.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert routing.expert_ids.unique().numel() > 4


def test_seeded_noise_does_not_depend_on_how_modules_fill_themselves() -> None:
    """Runs with noise repeat: their stream begins where torch's own filling of the linear layers ends."""
    m = Decoder(ModelConfig(vocab_size=67, hidden_size=32, num_hidden_layers=2, moe=MOE))
    torch.manual_seed(5)
    for part in m.modules():
        if isinstance(part, nn.Embedding):
            nn.Embedding(*part.weight.shape)
        elif isinstance(part, nn.Linear):
            nn.Linear(part.in_features, part.out_features, part.bias is not None)
    expected = torch.rand(8)
    torch.rand(3)
    seed_noise(m, 5)
    assert torch.equal(torch.rand(8), expected)
