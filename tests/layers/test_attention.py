"""Masks, the largest logits for QK-Clip, caches and their sizes."""

import pytest
import torch

from manyhands.config import AttentionConfig, ModelConfig, RopeConfig
from manyhands.layers.attention import Positions, causal_mask, max_logits
from manyhands.layers.cache.contiguous import ContiguousLayer
from manyhands.layers.latent_attention import LatentAttention
from manyhands.layers.rope import rope_tables

from ..models.tiny_models import ids, tiny


def by_hand(real: list[bool], num_queries: int, window: int | None) -> list[list[bool]]:
    """Query i sees key j if j is real, not later, and among the last `window` real tokens up to i; itself always."""
    L, rows = len(real), []
    for i in range(L - num_queries, L):
        seen = [j for j in range(i + 1) if real[j]]
        seen = seen if window is None or not real[i] else seen[-window:]
        rows.append([j == i or j in seen for j in range(L)])
    return rows


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("num_queries", [1, 4, 7])
@pytest.mark.parametrize("pattern", ["1111111", "0011111", "1111100", "1100111"])
def test_masks(window: int | None, num_queries: int, pattern: str) -> None:
    real = [c == "1" for c in pattern]
    mask = causal_mask(torch.tensor([real]), num_queries, window, plain=False)
    expected = by_hand(real, num_queries, window)
    for row, (got, want) in enumerate(zip(mask[0, 0].tolist(), expected, strict=True)):
        if real[7 - num_queries + row]:  # what padding sees is nobody's business, but it must see something
            assert got == want
        assert any(got)


def test_no_mask_where_none_is_needed() -> None:
    real = torch.ones(1, 6, dtype=torch.bool)
    assert causal_mask(real, 6, None, plain=True) is None and causal_mask(real, 1, None, plain=True) is None
    assert causal_mask(real, 6, 6, plain=True) is None
    assert causal_mask(real, 3, None, plain=True) is not None and causal_mask(real, 6, 5, plain=True) is not None


def positions(S: int, clip: float, mask: torch.Tensor | None = None) -> Positions:
    return Positions(rope_tables(RopeConfig(), 4, torch.arange(S)[None]), mask, True, clip)


def test_max_logits_is_exact_above_the_limit_and_a_bound_below() -> None:
    q, k = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    exact = (0.5 * q @ k.transpose(-2, -1)).masked_fill(~causal, float("-inf")).amax((0, 2, 3))
    torch.testing.assert_close(max_logits(q, k, 0.5, positions(5, clip=0.0)), exact)
    bound = max_logits(q, k, 0.5, positions(5, clip=1e9))
    assert (bound >= exact).all() and (bound > exact).any()


@pytest.mark.parametrize("attention", ["gqa", "mla"])
def test_max_logits_of_a_model(attention: str) -> None:
    model = tiny(attention)
    assert model.hidden(ids()).max_logits == {}
    largest = model.hidden(ids(), clip_above=0.0).max_logits
    assert sorted(largest) == [0, 1, 2] and all(v.shape == (4,) and not v.requires_grad for v in largest.values())
    with torch.no_grad():  # the first layer by hand: logits are linear in the query weights
        name = "q_proj"
        getattr(model.layers[0].self_attn, name).weight.mul_(2.0)
    doubled = model.hidden(ids(), clip_above=0.0).max_logits[0]
    torch.testing.assert_close(doubled, 2 * largest[0], rtol=1e-5, atol=1e-5)


def test_mla_cache_is_576_values_at_v3_sizes() -> None:
    a = AttentionConfig(kind="mla", num_attention_heads=1, q_lora_rank=8)  # R, r, n, v default to V3's
    attention = LatentAttention(ModelConfig(hidden_size=8, attention=a))
    cache = ContiguousLayer()
    attention(torch.zeros(2, 3, 8), Positions(rope_tables(RopeConfig(), 64, torch.arange(3)[None]), None, True), cache)
    assert cache.values_per_token == 576 and cache.length == 3


def test_gqa_cache_is_two_heads_wide() -> None:
    model = tiny("gqa")
    cache = model.new_cache()
    model(ids(), cache=cache)
    assert [layer.values_per_token for layer in cache.layers] == [2 * 2 * 8] * 3


def test_cache_grows_and_keeps_what_it_had() -> None:
    cache, parts = ContiguousLayer(), []
    for n in (1, 63, 1, 200, 3):
        parts.append(torch.randn(2, 4, n, 8))
        (got,) = cache.append(parts[-1])
        assert torch.equal(got, torch.cat(parts, 2))
    assert cache.length == 268


def test_mla_scale_uses_the_whole_head_and_mscale_squared() -> None:
    a = AttentionConfig(kind="mla", num_attention_heads=1)
    plain = LatentAttention(ModelConfig(hidden_size=8, attention=a))
    assert plain.scale == pytest.approx(192**-0.5)
    yarn = RopeConfig(rope_type="yarn", factor=40.0, original_max_position_embeddings=4096, mscale_all_dim=1.0)
    scaled = LatentAttention(ModelConfig(hidden_size=8, attention=a, rope=yarn))
    assert scaled.scale == pytest.approx(192**-0.5 * 1.3689**2, rel=1e-4)
