"""The oracle's attention, float64, written from the papers and apart from `manyhands/layers`.

GQA (arXiv 2305.13245), MLA with its keys and values built in full (2405.04434), rotation (2104.09864) plain, linear,
YaRN (2309.00071), Llama 3.1's (2407.21783) and LongRoPE's (2402.13753), QK-norm, windows, sinks (gpt-oss), soft cap
(Grok-1). The whole sequence at once: there is no cache in it, so it is also what decoding to a cache must give.

B batch, S sequence, H heads, G key/value heads, d head width, D model width.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from manyhands.config import ModelConfig, RopeConfig

Params = Mapping[str, Tensor]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean(x²) + eps) · weight."""
    return x / ((x * x).mean(-1, keepdim=True) + eps).sqrt() * weight


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x − mean) / √(variance + eps) · weight + bias."""
    apart = x - x.mean(-1, keepdim=True)
    return apart / ((apart * apart).mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def temperature(factor: float, mscale: float) -> float:
    """YaRN, arXiv 2309.00071 §3.4: √(1/t) = 0.1·m·ln(s) + 1."""
    return 1.0 + 0.1 * mscale * math.log(factor) if factor > 1.0 else 1.0


def speeds(rope: RopeConfig, dim: int, long: bool = False) -> tuple[list[float], float]:
    """Radians per position of each of the dim/2 pairs, and what cos and sin are multiplied by.

    `long`: LongRoPE's in a sequence of more tokens than the original length.
    """
    plain = [rope.rope_theta ** (-2.0 * i / dim) for i in range(dim // 2)]
    s, length = rope.factor, float(rope.original_max_position_embeddings or 1)
    if rope.rope_type == "default":
        return plain, 1.0
    if rope.rope_type == "linear":
        return [w / s for w in plain], 1.0
    if rope.rope_type == "llama3":
        longest, shortest = length / rope.low_freq_factor, length / rope.high_freq_factor
        found = []
        for w in plain:
            wavelength = 2.0 * math.pi / w
            if wavelength > longest:
                found.append(w / s)
            elif wavelength < shortest or longest == shortest:
                found.append(w)
            else:
                smooth = (length / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
                found.append((1.0 - smooth) * w / s + smooth * w)
        return found, 1.0
    if rope.rope_type == "longrope":
        given, scale = (rope.long_factor, rope.long_mscale) if long else (rope.short_factor, rope.short_mscale)
        # arXiv 2402.13753 §3.3: the logits grow with the context as its logarithm does
        return [w / by for w, by in zip(plain, given or (), strict=True)], (
            math.sqrt(1.0 + math.log(s) / math.log(length)) if scale is None else scale
        )
    # the pair that turns β times over the original context: θ^(-2i/dim)·length = 2πβ, solved for i
    first, last = (
        dim * math.log(length / (2.0 * math.pi * beta)) / (2.0 * math.log(rope.rope_theta))
        for beta in (rope.beta_fast, rope.beta_slow)
    )
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    found = []
    for i, w in enumerate(plain):
        interpolated = min(max((i - first) / max(last - first, 1e-3), 0.0), 1.0)
        found.append(w * (1.0 - interpolated) + w / s * interpolated)
    if rope.attention_factor is not None:
        return found, rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return found, temperature(s, rope.mscale) / temperature(s, rope.mscale_all_dim)
    return found, temperature(s, 1.0)


def rotate(x_BSHd: Tensor, position_BS: Tensor, rope: RopeConfig, dim: int) -> Tensor:
    """The first `dim` numbers of each head turned pair by pair; each pair stays where it was."""
    if rope.rope_type == "longrope":
        assert rope.original_max_position_embeddings is not None
        sequences = zip(x_BSHd, position_BS, strict=True)  # the last real token's place says how many there are
        return torch.stack(
            [
                _turned(x[None], at[None], rope, dim, int(at.max()) + 1 > rope.original_max_position_embeddings)[0]
                for x, at in sequences
            ]
        )
    return _turned(x_BSHd, position_BS, rope, dim, False)


def _turned(x_BSHd: Tensor, position_BS: Tensor, rope: RopeConfig, dim: int, long: bool) -> Tensor:
    radians, factor = speeds(rope, dim, long)
    columns = list(x_BSHd.unbind(-1))
    for i, w in enumerate(radians):
        one, two = (2 * i, 2 * i + 1) if rope.interleave else (i, i + dim // 2)
        angle = position_BS.double()[:, :, None] * w
        cos, sin = factor * angle.cos(), factor * angle.sin()
        a, b = columns[one], columns[two]
        columns[one], columns[two] = a * cos - b * sin, a * sin + b * cos
    return torch.stack(columns, -1)


def visible(mask_BS: Tensor, window: int | None, chunk: int | None = None) -> Tensor:
    """[B, S, S] bool: whether a query sees a key. Itself always; of real tokens the last `window`, of its `chunk`."""
    S = mask_BS.shape[1]
    nth = mask_BS.long().cumsum(1)
    back = nth[:, :, None] - nth[:, None, :]
    earlier = torch.ones(S, S, dtype=torch.bool).tril()
    near = back < (S + 1 if window is None else window)
    if chunk is not None:
        number = torch.div(nth.clamp(min=1) - 1, chunk, rounding_mode="floor")
        near = near & (number[:, :, None] == number[:, None, :])
    return (earlier & near & mask_BS[:, None, :]) | torch.eye(S, dtype=torch.bool)


def mix(
    q: Tensor, k: Tensor, v: Tensor, seen_BSS: Tensor, scale: float, cap: float | None, sinks_H: Tensor | None
) -> Tensor:
    """q, k [B, S, H, d], v [B, S, H, w] -> [B, S, H, w]; a sink takes its share of the softmax and gives nothing."""
    logits = scale * torch.einsum("bqhd,bkhd->bhqk", q, k)
    logits = logits if cap is None else cap * (logits / cap).tanh()
    logits = torch.where(seen_BSS[:, None], logits, -math.inf)
    top = logits.detach().amax(-1, keepdim=True)  # the same on both sides of the fraction: large logits stay finite
    top = top if sinks_H is None else torch.maximum(top, sinks_H.detach()[:, None, None])
    powers = (logits - top).exp()
    total = powers.sum(-1, keepdim=True)
    total = total if sinks_H is None else total + (sinks_H[:, None, None] - top).exp()
    return torch.einsum("bhqk,bkhw->bqhw", powers / total, v)


def attention(p: Params, prefix: str, x_BSD: Tensor, config: ModelConfig, layer: int, mask_BS: Tensor) -> Tensor:
    """[B, S, D] -> [B, S, D] in decoder layer `layer`."""
    position_BS = (mask_BS.long().cumsum(1) - 1).clamp(min=0)
    seen = visible(mask_BS, config.attention.window(layer), config.attention.chunk(layer))
    if config.attention.kind == "mla":
        heads = _latent(p, prefix, x_BSD, config, position_BS, seen)
    else:
        heads = _grouped(p, prefix, x_BSD, config, position_BS, seen, layer not in config.attention.nope_layers)
    return _product(p, prefix + "o_proj", heads.flatten(2))


def _product(p: Params, name: str, x: Tensor) -> Tensor:
    y = x @ p[name + ".weight"].T
    return y + p[name + ".bias"] if name + ".bias" in p else y


def _grouped(
    p: Params, prefix: str, x: Tensor, config: ModelConfig, position_BS: Tensor, seen: Tensor, rotates: bool
) -> Tensor:
    a, eps, (B, S, _) = config.attention, config.rms_norm_eps, x.shape
    q, k, v = (_product(p, f"{prefix}{name}_proj", x) for name in "qkv")

    def normed(t: Tensor, name: str, when: str) -> Tensor:
        return rms_norm(t, p[f"{prefix}{name}_norm.weight"], eps) if a.qk_norm == when else t

    q, k = normed(q, "q", "full"), normed(k, "k", "full")  # over the whole projected width
    q, k, v = (t.view(B, S, -1, a.head_dim) for t in (q, k, v))
    q, k = normed(q, "q", "head"), normed(k, "k", "head")
    if rotates:
        q, k = (rotate(t, position_BS, config.rope, config.rope_dim) for t in (q, k))
    q, k = normed(q, "q", "head_after_rope"), normed(k, "k", "head_after_rope")
    if rotates and a.qk_norm == "unweighted_after_rope":
        one = torch.ones((), dtype=x.dtype)
        q, k = rms_norm(q, one, eps), rms_norm(k, one, eps)
    if not rotates and a.floor_scale is not None:
        times = (position_BS + 1.0).double().div(a.floor_scale).floor()
        q = q * (1.0 + a.attn_scale * (1.0 + times).log())[:, :, None, None]
    owner = torch.arange(a.num_attention_heads) // (a.num_attention_heads // a.kv_heads)
    scale = a.attention_multiplier or 1.0 / math.sqrt(a.head_dim)
    return mix(q, k[:, :, owner], v[:, :, owner], seen, scale, a.attn_logit_softcap, p.get(prefix + "sinks"))


def _latent(p: Params, prefix: str, x: Tensor, config: ModelConfig, position_BS: Tensor, seen: Tensor) -> Tensor:
    a, eps, (B, S, _) = config.attention, config.attention.latent_norm_eps or config.rms_norm_eps, x.shape
    H, n, r, R = a.num_attention_heads, a.qk_nope_head_dim, a.qk_rope_head_dim, a.kv_lora_rank
    if a.q_lora_rank is None:
        q = _product(p, prefix + "q_proj", x)
    else:
        q = rms_norm(_product(p, prefix + "q_a_proj", x), p[prefix + "q_a_layernorm.weight"], eps)
        q = _product(p, prefix + "q_b_proj", q)
    q = q.view(B, S, H, n + r)
    compressed = _product(p, prefix + "kv_a_proj_with_mqa", x)
    latent = rms_norm(compressed[..., :R], p[prefix + "kv_a_layernorm.weight"], eps)
    shared = rotate(compressed[:, :, None, R:], position_BS, config.rope, config.rope_dim)
    kv = _product(p, prefix + "kv_b_proj", latent).view(B, S, H, n + a.v_head_dim)
    q = torch.cat((q[..., :n], rotate(q[..., n:], position_BS, config.rope, config.rope_dim)), -1)
    k = torch.cat((kv[..., :n], shared.expand(B, S, H, r)), -1)
    scale = 1.0 / math.sqrt(n + r)
    if config.rope.rope_type == "yarn" and config.rope.mscale_all_dim:
        scale *= temperature(config.rope.factor, config.rope.mscale_all_dim) ** 2
    return mix(q, k, kv[..., n:], seen, scale, None, None)
