"""T5's attention (arXiv 1910.10683, section 2.1): learned biases by relative position, and no division by √d.

Reference: transformers `models/t5/modeling_t5.py`. B batch, S queries, L keys, H heads, d head width.
"""

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyhands.config import EncoderDecoderConfig
from manyhands.layers.linear import Linear, reset_parts


def buckets(relative: Tensor, num_buckets: int, max_distance: int, *, bidirectional: bool) -> Tensor:
    """int64, the shape of `relative` = key position − query position: which row of the table serves it.

    The near half of the buckets has one distance each; in the far half distances grow by a factor, and all from
    `max_distance` on share the last one. Looking both ways, keys before the query have the first half of the table and
    keys after it the second; looking back only, all keys after the query share bucket 0.
    """
    offset = torch.zeros_like(relative)
    if bidirectional:
        num_buckets //= 2
        offset = (relative > 0).long() * num_buckets
        distance = relative.abs()
    else:
        distance = (-relative).clamp(min=0)
    exact = num_buckets // 2
    growth = torch.log(distance.float().clamp(min=1) / exact) / math.log(max_distance / exact)
    far = (exact + (growth * (num_buckets - exact)).long()).clamp(max=num_buckets - 1)
    return offset + torch.where(distance < exact, distance, far)


class RelativeBias(nn.Module):
    """The one table of a stack, [buckets, H], which all its layers use."""

    def __init__(self, config: EncoderDecoderConfig, *, bidirectional: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.relative_attention_num_buckets, config.num_attention_heads))
        self.max_distance = config.relative_attention_max_distance
        self.bidirectional = bidirectional
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02, generator: torch.Generator | None = None) -> None:
        """Fresh weights: N(0, std²)."""
        with torch.no_grad():
            self.weight.normal_(0.0, std, generator=generator)

    def forward(self, num_queries: int, length: int, real_BL: Tensor | None, dtype: torch.dtype) -> Tensor:
        """[B or 1, H, S, L]: what the last S of L positions add to their logits, −∞ where they may not look.

        `real_BL` is false for padding, None where there is none.
        """
        keys = torch.arange(length, device=self.weight.device)
        relative_SL = keys[None] - keys[length - num_queries :, None]
        index_SL = buckets(relative_SL, len(self.weight), self.max_distance, bidirectional=self.bidirectional)
        bias_HSL = F.embedding(index_SL, self.weight).permute(2, 0, 1).to(dtype)
        hidden = None if real_BL is None else ~real_BL[:, None, None]
        if not self.bidirectional:
            later_SL = relative_SL > 0
            hidden = later_SL if hidden is None else hidden | later_SL
        return bias_HSL[None] if hidden is None else hide(bias_HSL[None], hidden)

    if TYPE_CHECKING:
        __call__ = forward  # so that calls are typed


def hide(bias: Tensor, hidden: Tensor) -> Tensor:
    """`bias` with −∞ for the keys that are `hidden`; a query that would see none of them sees all.

    Such a query is padding, or its whole row is, and means nothing, but must be finite: the lowest number in the place
    of −∞ would give it wrong gradients, since the logarithm of how many keys there are is lost beside it.
    """
    return bias.masked_fill(hidden & ~hidden.all(-1, keepdim=True), float("-inf"))


class RelativeAttention(nn.Module):
    """Queries of one sequence, keys and values of the same or another. The heads' inner width may differ from D."""

    def __init__(self, config: EncoderDecoderConfig) -> None:
        super().__init__()
        D, wide = config.hidden_size, config.num_attention_heads * config.head_dim
        self.head_dim = config.head_dim
        self.q_proj = Linear(D, wide, bias=False)
        self.k_proj = Linear(D, wide, bias=False)
        self.v_proj = Linear(D, wide, bias=False)
        self.o_proj = Linear(wide, D, bias=False)

    def reset_parameters(self) -> None:
        """Fresh weights everywhere in here, as `Linear` gives them."""
        reset_parts(self)

    def keys_values(self, y_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, L, d] of what is looked at."""
        return self._heads(self.k_proj(y_BLD)), self._heads(self.v_proj(y_BLD))

    def forward(self, x_BSD: Tensor, k_BHLd: Tensor, v_BHLd: Tensor, bias: Tensor | None) -> Tensor:
        """[B, S, D] -> [B, S, D]; `bias` is added to the logits: broadcast to [B, H, S, L], None for 0."""
        q_BHSd = self._heads(self.q_proj(x_BSD))
        y_BHSd = F.scaled_dot_product_attention(q_BHSd, k_BHLd, v_BHLd, attn_mask=bias, scale=1.0)
        return self.o_proj(y_BHSd.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        """[B, S, H·d] -> [B, H, S, d]."""
        return x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)

    if TYPE_CHECKING:
        __call__ = forward  # so that calls are typed
