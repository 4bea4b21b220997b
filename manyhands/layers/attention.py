"""Multi-head and grouped-query attention. `scaled_dot_product_attention` does the maths.

B batch, S queries, L keys (L = S without a cache), H heads, G key/value heads, d head width.

A batch is a rectangle, or ragged: B = 1, and the S tokens are those of several sequences, one behind the other, each
with a cache of its own or all without (`Positions.rows`). All tokens are projected at once; each sequence attends by
itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyhands.config import ModelConfig
from manyhands.config.attention import LayerType
from manyhands.kernels.attention import attend_natively
from manyhands.kernels.moment import ordinary
from manyhands.layers.cache import LayerCache
from manyhands.layers.linear import Linear, reset_parts
from manyhands.layers.norm import RMSNorm
from manyhands.layers.packed_linear import linears
from manyhands.layers.rope import apply_rope


@dataclass(frozen=True, slots=True)
class Positions:
    """What every layer's attention needs to know about where the tokens are; built once per forward."""

    rope: tuple[Tensor, Tensor]
    mask: Tensor | None
    """[B, 1, S, L] bool, true where a query may look; None when `causal` says it all."""
    causal: bool
    clip_above: float | None = None
    """Report the largest attention logit per head, exactly where it may exceed this (QK-Clip)."""
    real_BS: Tensor | None = None
    """[B, S] bool, false for padding among the queries; None where there is none."""
    sliding_mask: Tensor | None = None
    """`mask` for the layers with a sliding window."""
    chunked_mask: Tensor | None = None
    """`mask` for the layers with chunks."""
    temperature: Tensor | None = None
    """[B, 1, S, 1] float32: what queries are multiplied by in the layers without rotation; None: nothing."""
    start_B: Tensor | None = None
    """[B or 1] int64: where each row's real positions begin, where `start_of` says it; for the native kernels."""
    rows: "tuple[tuple[slice, Positions], ...]" = ()
    """Of a ragged batch: which of the S tokens each sequence has, and where those are. Empty for a rectangle."""

    def mask_of(self, kind: LayerType) -> Tensor | None:
        """The mask of a layer."""
        if kind == "full_attention":
            return self.mask
        return self.sliding_mask if kind == "sliding_attention" else self.chunked_mask


Caches = LayerCache | Sequence[LayerCache] | None
"""One for a rectangle, one for each row of a ragged batch; None without."""


def each_row(
    core: Callable[..., tuple[Tensor, Tensor | None]], positions: Positions, caches: Caches, *parts: Tensor
) -> tuple[Tensor, Tensor | None]:
    """`core(*parts, positions, cache)` [B, H, S, d], of a ragged batch for each sequence by itself.

    The parts are [B, ·, S, ·]. What the core says besides, the largest logits [H], is over all sequences.
    """
    if not positions.rows:
        return core(*parts, positions, caches)
    assert caches is None or isinstance(caches, Sequence)
    each: Sequence[LayerCache | None] = [None] * len(positions.rows) if caches is None else caches
    done = [
        core(*(part[:, :, tokens] for part in parts), row, cache)
        for (tokens, row), cache in zip(positions.rows, each, strict=True)
    ]
    largest = [found_H for _, found_H in done if found_H is not None]
    return torch.cat([y for y, _ in done], 2), torch.stack(largest).amax(0) if largest else None


def causal_mask(
    real_BL: Tensor, num_queries: int, sliding_window: int | None, plain: bool, chunk: int | None = None
) -> Tensor | None:
    """[B, 1, S, L] bool for the last S of L positions, or None where `is_causal` or no mask is enough.

    `plain` says that there is no padding. A padding query sees itself, so that no row is empty. Window and chunks
    count real tokens: padding between them (a right-padded prompt that is continued) takes no room in them.
    """
    L = real_BL.shape[1]
    if plain and min(sliding_window or L, chunk or L) >= L and num_queries in (1, L):
        return None
    keys = torch.arange(L, device=real_BL.device)
    queries = keys[L - num_queries :, None]
    allowed_SL = keys <= queries
    if sliding_window is not None:
        place_BL = real_BL.cumsum(1)
        window_BSL = place_BL[:, None, :] > place_BL[:, L - num_queries :, None] - sliding_window
        allowed_SL = allowed_SL & window_BSL  # now [B, S, L]
    if chunk is not None:
        chunk_BL = (real_BL.cumsum(1) - 1).clamp(min=0) // chunk
        allowed_SL = allowed_SL & (chunk_BL[:, None, :] == chunk_BL[:, L - num_queries :, None])
    return ((allowed_SL & real_BL[:, None, :]) | (keys == queries))[:, None]


def start_of(real_BL: Tensor, plain: bool) -> Tensor | None:
    """[B or 1] int64: how many positions at the head of each row are padding; L where all are.

    None where real positions are not in one piece (a right-padded prompt that was continued), and in a moment that is
    not ordinary, or away from the CPU, where no native kernel is asked.
    """
    if real_BL.device.type != "cpu" or not ordinary():
        return None
    if plain:
        return torch.zeros(1, dtype=torch.int64)
    place_BL = real_BL.cumsum(1)
    start_B, gaps_BL = (place_BL == 0).sum(1), ~real_BL[:, :-1] & real_BL[:, 1:]  # padding before a real position
    return None if bool((gaps_BL.sum(1) > (start_B > 0)).any()) else start_B


@torch.no_grad()
def max_logits(
    q_BHSd: Tensor, k_BHLd: Tensor, scale: float, positions: Positions, kind: LayerType = "full_attention"
) -> Tensor:
    """[H] float32: the largest scale·q·k a real query saw, per head (QK-Clip's S).

    First the bound max‖q‖·max‖k‖, which costs nothing; the products only where it exceeds `clip_above`.
    """
    assert positions.clip_above is not None
    q, k = q_BHSd.float(), k_BHLd.float()
    bound_H: Tensor = scale * q.norm(dim=-1).amax((0, 2)) * k.norm(dim=-1).amax((0, 2))
    if bool((bound_H <= positions.clip_above).all()):
        return bound_H
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
    mask = positions.mask_of(kind)
    blocked = hidden if mask is None else ~mask
    if positions.real_BS is not None:
        blocked = blocked | ~positions.real_BS[:, None, :, None]
    logits_BHSL = torch.matmul(q, k.transpose(-2, -1)).mul_(scale).masked_fill_(blocked, float("-inf"))
    return logits_BHSL.amax((0, 2, 3))


def attend(
    q_BHSd: Tensor, k_BHLd: Tensor, v_BHLd: Tensor, mask: Tensor | None, scale: float, cap: float | None, sinks: Tensor
) -> Tensor:
    """Attention written out, for what `scaled_dot_product_attention` cannot do: a soft cap on the logits, sinks.

    A sink [H] takes part in the softmax and has no value; −inf is none. `mask` None lets every query see every key.
    """
    logits_BHSL = torch.matmul(q_BHSd * scale, k_BHLd.transpose(-2, -1))
    if cap is not None:
        logits_BHSL = cap * torch.tanh(logits_BHSL / cap)
    if mask is not None:
        logits_BHSL = logits_BHSL.masked_fill(~mask, float("-inf"))
    sinks_BHS1 = sinks.to(logits_BHSL.dtype)[None, :, None, None].expand(*logits_BHSL.shape[:3], 1)
    with_sink = torch.cat((logits_BHSL, sinks_BHS1), dim=-1)
    weights_BHSL = with_sink.softmax(-1, dtype=torch.promote_types(q_BHSd.dtype, torch.float32))[..., :-1]
    return torch.matmul(weights_BHSL.to(v_BHLd.dtype), v_BHLd)


def better_in_float32(q_BHSd: Tensor) -> bool:
    """One query in 16 bits on a CPU: PyTorch's kernel takes three times as long as converting the keys and values."""
    return q_BHSd.shape[2] == 1 and q_BHSd.dtype in (torch.bfloat16, torch.float16) and q_BHSd.device.type == "cpu"


class Attention(nn.Module):
    """MHA or GQA, with optional QK-norm, biases, sliding window or chunks, sinks and soft cap; with or without
    rotation."""

    def __init__(self, config: ModelConfig, layer: int = 0) -> None:
        super().__init__()
        a, D = config.attention, config.hidden_size
        self.config = a
        self.window = a.window(layer)
        self.kind = a.layer_type(layer)
        self.rotates = layer not in a.nope_layers
        self.eps = config.rms_norm_eps
        self.scale = a.attention_multiplier or a.head_dim**-0.5
        self.interleave = config.rope.interleave
        H, G, d = a.num_attention_heads, a.kv_heads, a.head_dim
        self.q_proj = Linear(D, H * d, bias=a.attention_bias)
        self.k_proj = Linear(D, G * d, bias=a.attention_bias)
        self.v_proj = Linear(D, G * d, bias=a.attention_bias)
        self.o_proj = Linear(H * d, D, bias=a.output_bias)
        self.q_norm = self.k_norm = None
        if a.qk_norm not in ("none", "unweighted_after_rope"):
            full = a.qk_norm == "full"
            self.q_norm = RMSNorm(H * d if full else d, config.rms_norm_eps)
            self.k_norm = RMSNorm(G * d if full else d, config.rms_norm_eps)
        self.sinks = nn.Parameter(torch.zeros(H)) if a.sinks else None

    def reset_parameters(self) -> None:
        """Fresh weights everywhere in here; sinks 0."""
        reset_parts(self)
        if self.sinks is not None:
            nn.init.zeros_(self.sinks)

    def extra_repr(self) -> str:
        """Heads, and the window if there is one."""
        a = self.config
        heads = f"num_attention_heads={a.num_attention_heads}, num_key_value_heads={a.kv_heads}, head_dim={a.head_dim}"
        return heads if self.window is None else f"{heads}, sliding_window={self.window}"

    def forward(self, x_BSD: Tensor, positions: Positions, cache: Caches = None) -> tuple[Tensor, Tensor | None]:
        """[B, S, D] -> [B, S, D], and the largest logit per head [H] when QK-Clip asks for it."""
        B, S, _ = x_BSD.shape
        d = self.config.head_dim
        q, k, v = linears(x_BSD, self.q_proj, self.k_proj, self.v_proj)
        if self.config.qk_norm == "full":
            assert self.q_norm is not None and self.k_norm is not None
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.view(B, S, -1, d) for t in (q, k, v))
        if self.config.qk_norm == "head":
            assert self.q_norm is not None and self.k_norm is not None
            q, k = self.q_norm(q), self.k_norm(k)
        q_BHSd, k_BGLd = q.transpose(1, 2), k.transpose(1, 2)
        if self.rotates:
            q_BHSd, k_BGLd = (apply_rope(t, positions.rope, self.interleave) for t in (q_BHSd, k_BGLd))
        elif positions.temperature is not None:
            q_BHSd = (q_BHSd * positions.temperature).to(q.dtype)
        if self.config.qk_norm == "head_after_rope":
            assert self.q_norm is not None and self.k_norm is not None
            q_BHSd, k_BGLd = self.q_norm(q_BHSd), self.k_norm(k_BGLd)
        elif self.config.qk_norm == "unweighted_after_rope" and self.rotates:
            q_BHSd, k_BGLd = (F.rms_norm(t.float(), (d,), eps=self.eps).to(t.dtype) for t in (q_BHSd, k_BGLd))
        y_BHSd, largest_H = each_row(self._core, positions, cache, q_BHSd, k_BGLd, v.transpose(1, 2))
        return self.o_proj(y_BHSd.transpose(1, 2).reshape(B, S, -1).to(x_BSD.dtype)), largest_H

    def _core(
        self, q_BHSd: Tensor, k_BGLd: Tensor, v_BGLd: Tensor, positions: Positions, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor | None]:
        """What the heads say [B, H, S, d], and the largest logit per head."""
        S = q_BHSd.shape[2]
        if cache is not None:
            k_BGLd, v_BGLd = cache.append(k_BGLd, v_BGLd)
        groups = self.config.num_attention_heads // self.config.kv_heads
        mask = positions.mask_of(self.kind)
        largest_H = None
        if positions.clip_above is not None:
            largest_H = max_logits(q_BHSd, k_BGLd.repeat_interleave(groups, 1), self.scale, positions, self.kind)
        cap = self.config.attn_logit_softcap
        start_B = None if self.kind == "chunked_attention" and mask is not None else positions.start_B
        done = attend_natively(q_BHSd, k_BGLd, v_BGLd, start_B, self.window, self.scale, self.sinks, cap)
        if done is not None:
            return done, largest_H
        if cap is not None or self.sinks is not None:
            if mask is None and S > 1:
                mask = torch.ones(S, k_BGLd.shape[2], dtype=torch.bool, device=q_BHSd.device).tril(k_BGLd.shape[2] - S)
            sinks_H = q_BHSd.new_full((self.config.num_attention_heads,), float("-inf"))
            k_BHLd, v_BHLd = (t.repeat_interleave(groups, 1) for t in (k_BGLd, v_BGLd))
            y_BHSd = attend(
                q_BHSd, k_BHLd, v_BHLd, mask, self.scale, cap, sinks_H if self.sinks is None else self.sinks
            )
        else:
            if better_in_float32(q_BHSd):
                q_BHSd, k_BGLd, v_BGLd = q_BHSd.float(), k_BGLd.float(), v_BGLd.float()
            y_BHSd = F.scaled_dot_product_attention(
                q_BHSd,
                k_BGLd,
                v_BGLd,
                attn_mask=mask,
                is_causal=positions.causal and mask is None,
                scale=self.scale,
                enable_gqa=groups > 1,
            )
        return y_BHSd, largest_H

    if TYPE_CHECKING:
        __call__ = forward  # so that calls are typed
