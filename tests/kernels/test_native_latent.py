"""Multi-head latent attention's own kernels: against float64, a row alone and among others."""

import pytest
import torch

from manyhands.config import AttentionConfig, ModelConfig, RopeConfig
from manyhands.kernels import native
from manyhands.kernels.moment import exactly
from manyhands.kernels.native import NativeError, library, step
from manyhands.layers.cache import LatentLayer
from manyhands.layers.latent_attention import LatentAttention
from manyhands.models.decoder import find_positions

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no native kernels: {native.missing()}")
LEVELS = [library.level_code(x) for x in native.levels()] if native.available() else []
H, N, V, R, ROPE = 3, 32, 48, 80, 16


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("values", [False, True])
def test_products_of_heads(values: bool, dtype: torch.dtype) -> None:
    weight = draw(H * (N + V), R).to(dtype)
    latent, x = step.latent_of(weight, H, N), draw(61, H * (R if values else N), seed=1)
    w = weight.double().view(H, N + V, R)
    each = x.double().view(61, H, -1).transpose(0, 1)
    right = each @ (w[:, N:].transpose(1, 2) if values else w[:, :N])
    seen = [step.latent_products(latent, values, x, level, threads) for level in LEVELS for threads in (1, 2)]
    torch.testing.assert_close(seen[0].double(), right.transpose(0, 1).flatten(1), atol=2e-5, rtol=2e-5)
    for i in (0, 7, 60):
        assert torch.equal(seen[-1][i : i + 1], step.latent_products(latent, values, x[i : i + 1]))
    fused = seen[2:]  # the portable level rounds between a product and a sum
    assert all(torch.equal(fused[0], y) for y in fused)


def test_latents_are_placed() -> None:
    who = step.Sequences(
        torch.tensor([0, 3, 40]), torch.tensor([30, 0]), torch.tensor([0, 2]), torch.tensor([3, 0, 1, 2])
    )
    pool = torch.zeros(4, 1, 32, R + ROPE)
    q, kv, placed = draw(40, H * (N + ROPE)), draw(40, R + ROPE, seed=1), torch.zeros(40, H * (R + ROPE))
    weight, cos, sin = draw(R, seed=2), draw(40, ROPE // 2, seed=3), draw(40, ROPE // 2, seed=4)
    turn = step.Rotation(cos, sin, True, k_norm=step.norm_of(weight, 1e-5))
    projection = draw(H * (N + V), R)
    latent, cache = step.latent_of(projection, H, N), step.cache_of(pool, pool[..., :R])
    step.latent_rope_and_cache(latent, q, kv, who, turn, cache, placed)

    def turned(x: torch.Tensor) -> torch.Tensor:
        a, b = x[..., 0::2], x[..., 1::2]
        c, s = (t if x.dim() == 2 else t[:, None] for t in (cos, sin))
        return torch.cat((a * c - b * s, b * c + a * s), -1)

    rows = torch.cat((step.rms_norm(kv[:, :R], step.norm_of(weight, 1e-5)), turned(kv[:, R:])), 1)
    expected = torch.zeros_like(pool)
    for s, first in ((0, 30), (1, 0)):
        for i in range(int(who.begin[s]), int(who.begin[s + 1])):
            p = first + i - int(who.begin[s])
            expected[who.blocks[who.table[s] + p // 32], 0, p % 32] = rows[i]
    torch.testing.assert_close(pool, expected, atol=1e-6, rtol=1e-6)
    heads = placed.view(40, H, -1)
    torch.testing.assert_close(heads[..., R:], turned(q.view(40, H, -1)[..., N:]), atol=1e-6, rtol=1e-6)
    assert not heads[..., :R].any()
    other = pool.clone()
    with pytest.raises(NativeError, match="its own value"):
        step.latent_rope_and_cache(latent, q, kv, who, turn, step.cache_of(pool, other[..., :R]), placed)
    with pytest.raises(NativeError, match="from a latent of 80"):
        latent.size -= 1
        step.latent_products(latent, False, draw(1, H * N))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prompt_in_chunks_has_its_bits_where_they_are_asked_for(dtype: torch.dtype) -> None:
    kind = {"kind": "mla", "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
    attention = AttentionConfig(num_attention_heads=4, **kind)
    config = ModelConfig(hidden_size=48, num_hidden_layers=1, attention=attention, rope=RopeConfig(interleave=True))
    torch.manual_seed(0)
    module = LatentAttention(config).to(dtype).eval()
    parts = [torch.randn(1, 4, n, w).to(dtype) for n, w in ((20, 16), (20, 16))]
    latent, k_rope = torch.randn(1, 1, 20, 32).to(dtype), torch.randn(1, 1, 20, 16).to(dtype)
    with torch.inference_mode(), exactly():
        whole, _ = module._core(*parts, latent, k_rope, find_positions(config, 20, 20, None, latent.device), None)
        cache, done = LatentLayer(), 0
        for n in (9, 1, 10):
            at = slice(done, done + n)
            positions = find_positions(config, n, done + n, None, latent.device)
            y, _ = module._core(*(p[:, :, at] for p in parts), latent[:, :, at], k_rope[:, :, at], positions, cache)
            assert torch.equal(y, whole[:, :, at])
            done += n
    with torch.inference_mode():
        plain, _ = module._core(*parts, latent, k_rope, find_positions(config, 20, 20, None, latent.device), None)
    torch.testing.assert_close(whole, plain, atol=1e-5 if dtype == torch.float32 else 3e-2, rtol=1e-2)
