"""Rotary position embedding (arXiv 2104.09864): plain, linear, YaRN (arXiv 2309.00071), Llama 3.1 (arXiv 2407.21783),
LongRoPE (arXiv 2402.13753).

B batch, H heads, S sequence, d the rotated width of a head.
"""

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from manyhands.config import RopeConfig
from manyhands.kernels.moment import ordinary, transformed


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's temperature: 0.1·mscale·ln(factor) + 1."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def inverse_frequencies(config: RopeConfig, dim: int, device: torch.device, long: bool = False) -> tuple[Tensor, float]:
    """Angles per position [dim/2] float32, and the factor cos and sin are multiplied by. Not to be written to.

    `long`: LongRoPE's for a sequence longer than the original length.

    Kept on a CPU, in an ordinary moment: what a trace, a mode or another device made is its own.
    """
    if device.type == "cpu" and ordinary():
        return _kept(config, dim, long)
    return _frequencies(config, dim, device, long)


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # what is kept may meet a gradient later
def _kept(config: RopeConfig, dim: int, long: bool) -> tuple[Tensor, float]:
    return _frequencies(config, dim, torch.device("cpu"), long)


def _frequencies(config: RopeConfig, dim: int, device: torch.device, long: bool) -> tuple[Tensor, float]:
    exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    plain = 1.0 / config.rope_theta**exponent
    if config.rope_type == "default":
        return plain, 1.0
    if config.rope_type == "linear":
        return plain / config.factor, 1.0

    if config.rope_type == "longrope":
        assert config.short_factor is not None and config.long_factor is not None
        factors = torch.tensor(config.long_factor if long else config.short_factor, device=device)
        return plain / factors, config.mscales[long]
    assert config.original_max_position_embeddings is not None
    length = config.original_max_position_embeddings
    if config.rope_type == "llama3":
        # 0: interpolate (long wavelengths), 1: keep; in between, linear in the turns over the original context
        low, high = config.low_freq_factor, config.high_freq_factor
        turns = length * plain / (2 * math.pi)
        kept = (turns >= low).float() if high == low else ((turns - low) / (high - low)).clamp(0.0, 1.0)
        return (1.0 - kept) * plain / config.factor + kept * plain, 1.0

    def dimension_of(rotations: float) -> float:
        """The dimension that turns `rotations` times over the original context."""
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    first, last = dimension_of(config.beta_fast), dimension_of(config.beta_slow)
    if config.truncate:
        first, last = math.floor(first), math.ceil(last)
    low, high = max(first, 0), min(last, dim - 1)
    steps = torch.arange(dim // 2, dtype=torch.float32, device=device)
    ramp = ((steps - low) / max(high - low, 1e-3)).clamp(0.0, 1.0)  # 0: keep the frequency, 1: interpolate it
    frequencies = plain * (1.0 - ramp) + plain / config.factor * ramp
    return frequencies, _yarn_attention_factor(config)


def _yarn_attention_factor(config: RopeConfig) -> float:
    if config.attention_factor is not None:
        return config.attention_factor
    if config.mscale and config.mscale_all_dim:
        return yarn_mscale(config.factor, config.mscale) / yarn_mscale(config.factor, config.mscale_all_dim)
    return yarn_mscale(config.factor)


def rope_tables(
    config: RopeConfig, dim: int, positions_BS: Tensor, length_BS: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin [B, 1, S, dim/2] float32 for integer positions [B, S].

    `length_BS` [B or 1, S or 1]: how many tokens the whole sequence has, which decides between LongRoPE's two sets.
    """
    if config.rope_type == "longrope":
        assert length_BS is not None and config.original_max_position_embeddings is not None
        long_BS1 = (length_BS > config.original_max_position_embeddings)[..., None]
        (few, short), (many, long) = (inverse_frequencies(config, dim, positions_BS.device, n) for n in (False, True))
        angles = positions_BS[:, None, :, None].float() * torch.where(long_BS1, many, few)[:, None]
        scale_B1S1 = torch.where(long_BS1, long, short).float()[:, None]
        return angles.cos() * scale_B1S1, angles.sin() * scale_B1S1
    frequencies, factor = inverse_frequencies(config, dim, positions_BS.device)
    angles = positions_BS[:, None, :, None].float() * frequencies
    cos, sin = angles.cos(), angles.sin()
    return (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)


class _Rotate(torch.autograd.Function):
    """(a, b) -> (a·cos − b·sin, b·cos + a·sin) on the two halves; the gradient is the inverse rotation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        if torch.is_grad_enabled():
            return apply_rope(dy, (cos, -sin), interleave=False), None, None
        return _rotate(dy, cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x32 = x.to(torch.promote_types(x.dtype, torch.float32))
    a, b = x32.chunk(2, dim=-1)
    if torch.compiler.is_compiling() or transformed():  # they take no `out` that is part of another tensor
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
    y = torch.empty_like(x32)
    first, second = y.chunk(2, dim=-1)
    torch.mul(a, cos, out=first)
    torch.mul(b, cos, out=second)
    first.addcmul_(b, sin, value=-1.0)
    second.addcmul_(a, sin)
    return y.to(x.dtype)


def apply_rope(x_BHSd: Tensor, tables: tuple[Tensor, Tensor], interleave: bool) -> Tensor:
    """Rotate [B, H, S, d], or its first dimensions if the tables are narrower.

    With `interleave` pairs are neighbours (DeepSeek) and come out as halves.

    The reordering is the same for queries and keys, so their products are unchanged.
    """
    rotated = 2 * tables[0].shape[-1]
    if rotated < x_BHSd.shape[-1]:
        x_rotated = apply_rope(x_BHSd[..., :rotated], tables, interleave)
        return torch.cat((x_rotated, x_BHSd[..., rotated:]), dim=-1)
    if interleave:
        x_BHSd = torch.cat((x_BHSd[..., 0::2], x_BHSd[..., 1::2]), dim=-1)
    if not torch.is_grad_enabled() or transformed():
        return _rotate(x_BHSd, *tables)
    y: Tensor = _Rotate.apply(x_BHSd, *tables)  # type: ignore[no-untyped-call]
    return y
