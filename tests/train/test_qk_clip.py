"""QK-Clip seen through real projections: the logits are recomputed from the clipped weights."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from manyhands.config.attention import AttentionConfig
from manyhands.train.qk_clip import qk_clip_

D, TOKENS, HEADS = 24, 10, 4


class Attention(nn.Module):
    """Only the projections, with random weights; biases too, to see that they follow."""

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__()
        h, d = config.num_attention_heads, config.head_dim
        if config.kind == "gqa":
            self.q_proj = nn.Linear(D, h * d)
            self.k_proj = nn.Linear(D, config.kv_heads * d)
            self.v_proj = nn.Linear(D, config.kv_heads * d)
            return
        nope, rope = config.qk_nope_head_dim, config.qk_rope_head_dim
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(D, h * (nope + rope), bias=False)
        else:
            self.q_a_proj = nn.Linear(D, config.q_lora_rank)
            self.q_b_proj = nn.Linear(config.q_lora_rank, h * (nope + rope), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(D, config.kv_lora_rank + rope)
        self.kv_b_proj = nn.Linear(config.kv_lora_rank, h * (nope + config.v_head_dim), bias=False)


def logits(attn: Attention, x_TD: Tensor, config: AttentionConfig) -> tuple[Tensor, Tensor]:
    """Raw logits `[H, T, T]` and values, in float64, without rotation (which is linear and keeps the argument)."""
    attn, x = attn.double(), x_TD.double()
    h, d, t = config.num_attention_heads, config.head_dim, len(x)
    if config.kind == "gqa":
        q = attn.q_proj(x).view(t, h, d)
        k = attn.k_proj(x).view(t, config.kv_heads, d).repeat_interleave(h // config.kv_heads, dim=1)
        scores, values = torch.einsum("ihd,jhd->hij", q, k), attn.v_proj(x)
    else:
        nope, rope = config.qk_nope_head_dim, config.qk_rope_head_dim
        q = attn.q_proj(x) if config.q_lora_rank is None else attn.q_b_proj(attn.q_a_proj(x))
        q_nope, q_rope = q.view(t, h, nope + rope).split([nope, rope], dim=-1)
        latent, k_rope = attn.kv_a_proj_with_mqa(x).split([config.kv_lora_rank, rope], dim=-1)
        k_nope, values = attn.kv_b_proj(latent).view(t, h, -1).split([nope, config.v_head_dim], dim=-1)
        scores = torch.einsum("ihd,jhd->hij", q_nope, k_nope) + torch.einsum("ihd,jd->hij", q_rope, k_rope)
    return scores.detach(), values.detach()


CONFIGS = {
    "mha": AttentionConfig(num_attention_heads=HEADS, head_dim=6, attention_bias=True),
    "gqa": AttentionConfig(num_attention_heads=HEADS, num_key_value_heads=2, head_dim=6, attention_bias=True),
    "mqa": AttentionConfig(num_attention_heads=HEADS, num_key_value_heads=1, head_dim=6),
    "mla": AttentionConfig(
        kind="mla",
        num_attention_heads=HEADS,
        q_lora_rank=12,
        kv_lora_rank=10,
        qk_nope_head_dim=6,
        qk_rope_head_dim=4,
        v_head_dim=5,
    ),
    "mla without q_lora": AttentionConfig(
        kind="mla",
        num_attention_heads=HEADS,
        kv_lora_rank=10,
        qk_nope_head_dim=6,
        qk_rope_head_dim=4,
        v_head_dim=5,
    ),
}


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> AttentionConfig:
    return CONFIGS[request.param]


def build(config: AttentionConfig) -> tuple[Attention, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Attention(config).double(), torch.randn(TOKENS, D).double()


def test_400_becomes_100_and_other_heads_keep_theirs(config: AttentionConfig) -> None:
    attn, x = build(config)
    before, values = logits(attn, x, config)
    max_H = before.amax((1, 2))
    # In units in which head 0 reaches 400, head 1 reaches 200 and the others exactly their limit or less.
    factor = torch.tensor([400.0, 200.0, 100.0, 7.0]).double() / max_H
    # τ = 100 in units of each head's own maximum: hand the clip the maxima a model so scaled would have.
    qk_clip_(attn, max_H * factor, 100.0, config)
    after, values_after = logits(attn, x, config)
    gamma_H = torch.tensor([0.25, 0.5, 1.0, 1.0]).double()
    torch.testing.assert_close(after, before * gamma_H[:, None, None], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close((after.amax((1, 2)) * factor)[:2], torch.full((2,), 100.0).double())
    assert torch.equal(values_after, values)


def test_scaled_weights_for_one_head() -> None:
    """Which rows take what: every head at S = 400, γ = .25, √γ = .5."""
    config = CONFIGS["mla"]
    attn, _ = build(config)
    before = {name: p.detach().clone() for name, p in attn.named_parameters()}
    qk_clip_(attn, torch.full((HEADS,), 400.0), 100.0, config)
    factors = {
        "q_b_proj.weight": torch.tensor([0.5] * 6 + [0.25] * 4).repeat(HEADS)[:, None],
        "kv_b_proj.weight": torch.tensor([0.5] * 6 + [1.0] * 5).repeat(HEADS)[:, None],
    }
    for name, p in attn.named_parameters():
        assert torch.equal(p, before[name] * factors.get(name, torch.ones(()))), name


def test_multi_head_shares_the_factor_evenly() -> None:
    config = CONFIGS["mha"]
    attn, _ = build(config)
    query, key, bias = attn.q_proj.weight.clone(), attn.k_proj.weight.clone(), attn.k_proj.bias.clone()
    qk_clip_(attn, torch.full((HEADS,), 400.0), 100.0, config)
    assert torch.equal(attn.q_proj.weight, query * 0.5)
    assert torch.equal(attn.k_proj.weight, key * 0.5) and torch.equal(attn.k_proj.bias, bias * 0.5)


@pytest.mark.parametrize("max_logit", [100.0, 99.0, 0.0, -3.0, float("-inf")])
def test_nothing_to_clip_is_bit_identical(config: AttentionConfig, max_logit: float) -> None:
    attn, _ = build(config)
    attn.float()
    before = [p.detach().clone() for p in attn.parameters()]
    qk_clip_(attn, torch.full((HEADS,), max_logit), 100.0, config)
    assert all(torch.equal(p, q) for p, q in zip(attn.parameters(), before, strict=True))


def test_maximum_is_within_tau_afterwards(config: AttentionConfig) -> None:
    attn, x = build(config)
    before, _ = logits(attn, x, config)
    tau = before.amax((1, 2)).median().item()
    qk_clip_(attn, before.amax((1, 2)), tau, config)
    after, _ = logits(attn, x, config)
    assert before.amax((1, 2)).max() > tau * 1.01
    assert after.amax((1, 2)).max() <= tau * (1 + 1e-12)


def test_qk_norm_makes_it_a_no_op() -> None:
    config = AttentionConfig(num_attention_heads=HEADS, head_dim=6, qk_norm="head")
    attn, _ = build(config)
    before = attn.q_proj.weight.clone()
    qk_clip_(attn, torch.full((HEADS,), 400.0), 100.0, config)
    assert torch.equal(attn.q_proj.weight, before)


def test_keeps_weights_trainable_leaves(config: AttentionConfig) -> None:
    attn, _ = build(config)
    attn.to(torch.bfloat16)
    qk_clip_(attn, torch.full((HEADS,), 400.0), 100.0, config)
    check: Callable[[nn.Parameter], bool] = lambda p: p.is_leaf and p.requires_grad and p.dtype == torch.bfloat16  # noqa: E731
    assert all(check(p) for p in attn.parameters())
