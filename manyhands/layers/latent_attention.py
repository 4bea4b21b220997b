"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values live in one small latent.

B batch, S queries, L keys, H heads, D model width, R latent width (kv_lora_rank), n and r the widths of a head's
part without and with rotation, v the width of a value head.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyhands.config import ModelConfig
from manyhands.kernels.attention import absorb, attend_natively, expand
from manyhands.kernels.moment import is_exact, ordinary, unheard
from manyhands.layers.attention import Caches, Positions, better_in_float32, each_row, max_logits
from manyhands.layers.cache import LayerCache
from manyhands.layers.linear import Linear, reset_parts
from manyhands.layers.norm import RMSNorm
from manyhands.layers.rope import apply_rope, yarn_mscale


class LatentAttention(nn.Module):
    """Low-rank queries, keys and values; one rotated key shared by all heads.

    The cache holds R + r values per token and layer (576 at V3's sizes). Decoding never rebuilds keys or values:
    the up-projections are absorbed into the query and the output.
    """

    def __init__(self, config: ModelConfig, layer: int = 0) -> None:
        super().__init__()
        a, D = config.attention, config.hidden_size
        self.config = a
        self.window = a.window(layer)
        self.kind = config.attention.layer_type(layer)
        self.interleave = config.rope.interleave
        H, R, n, r, v = (
            a.num_attention_heads,
            a.kv_lora_rank,
            a.qk_nope_head_dim,
            a.qk_rope_head_dim,
            a.v_head_dim,
        )
        eps = a.latent_norm_eps or config.rms_norm_eps
        self.q_a_proj = self.q_a_layernorm = self.q_b_proj = self.q_proj = None
        if a.q_lora_rank is None:
            self.q_proj = Linear(D, H * (n + r), bias=False)
        else:
            self.q_a_proj = Linear(D, a.q_lora_rank, bias=a.attention_bias)
            self.q_a_layernorm = RMSNorm(a.q_lora_rank, eps)
            self.q_b_proj = Linear(a.q_lora_rank, H * (n + r), bias=False)
        self.kv_a_proj_with_mqa = Linear(D, R + r, bias=a.attention_bias)
        self.kv_a_layernorm = RMSNorm(R, eps)
        self.kv_b_proj = Linear(R, H * (n + v), bias=False)
        self.o_proj = Linear(H * v, D, bias=a.output_bias or a.attention_bias)
        self.scale = (n + r) ** -0.5  # the whole head, not only the part without rotation
        rope = config.rope
        if rope.rope_type == "yarn" and rope.mscale_all_dim:
            self.scale *= yarn_mscale(rope.factor, rope.mscale_all_dim) ** 2

    def reset_parameters(self) -> None:
        """Fresh weights everywhere in here."""
        reset_parts(self)

    def forward(self, x_BSD: Tensor, positions: Positions, cache: Caches = None) -> tuple[Tensor, Tensor | None]:
        """[B, S, D] -> [B, S, D], and the largest logit per head [H] when QK-Clip asks for it."""
        q_nope, q_rope = self._queries(x_BSD, positions)
        compressed = self.kv_a_proj_with_mqa(x_BSD)
        latent, k_rope = compressed.split([self.config.kv_lora_rank, self.config.qk_rope_head_dim], dim=-1)  # type: ignore[no-untyped-call]
        latent_B1SR = self.kv_a_layernorm(latent)[:, None]
        k_rope_B1Sr = apply_rope(k_rope[:, None], positions.rope, self.interleave)
        y_BHSv, largest_H = each_row(self._core, positions, cache, q_nope, q_rope, latent_B1SR, k_rope_B1Sr)
        return self._output(y_BHSv), largest_H

    def _core(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        latent_B1SR: Tensor,
        k_rope_B1Sr: Tensor,
        positions: Positions,
        cache: LayerCache | None,
    ) -> tuple[Tensor, Tensor | None]:
        """What the heads say [B, H, S, v], and the largest logit per head."""
        one_way = ordinary() and not torch.is_grad_enabled() and is_exact() and positions.clip_above is None
        if cache is None and not one_way:
            return self._materialised(q_nope, q_rope, latent_B1SR[:, 0], k_rope_B1Sr, positions)
        decoding = cache is not None and cache.length > 0
        keys_B1Ld = torch.cat((latent_B1SR, k_rope_B1Sr), dim=-1)
        if cache is not None:
            (keys_B1Ld,) = cache.append(keys_B1Ld)
        if (decoding or one_way) and type(self.kv_b_proj) is Linear and unheard(self.kv_b_proj):  # its weight is read
            return self._absorbed(q_nope, q_rope, keys_B1Ld, positions), None
        R = self.config.kv_lora_rank
        return self._materialised(q_nope, q_rope, keys_B1Ld[:, 0, :, :R], keys_B1Ld[..., R:], positions)

    if TYPE_CHECKING:
        __call__ = forward  # so that calls are typed

    def _queries(self, x_BSD: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        a = self.config
        if self.q_proj is not None:
            q = self.q_proj(x_BSD)
        else:
            assert self.q_a_proj is not None and self.q_a_layernorm is not None and self.q_b_proj is not None
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BSD)))
        q_BHSd = q.view(*x_BSD.shape[:2], a.num_attention_heads, -1).transpose(1, 2)
        q_nope, q_rope = q_BHSd.split([a.qk_nope_head_dim, a.qk_rope_head_dim], dim=-1)  # type: ignore[no-untyped-call]
        return q_nope, apply_rope(q_rope, positions.rope, self.interleave)

    def _materialised(
        self, q_nope: Tensor, q_rope: Tensor, latent_BLR: Tensor, k_rope_B1Lr: Tensor, positions: Positions
    ) -> tuple[Tensor, Tensor | None]:
        """Training and prefill: keys and values are built once for all queries."""
        a = self.config
        B, L, _ = latent_BLR.shape
        kv = self.kv_b_proj(latent_BLR).view(B, L, a.num_attention_heads, -1).transpose(1, 2)
        k_nope, v_BHLv = kv.split([a.qk_nope_head_dim, a.v_head_dim], dim=-1)  # type: ignore[no-untyped-call]
        q = torch.cat((q_nope, q_rope), dim=-1)
        k = torch.cat((k_nope, k_rope_B1Lr.expand(-1, a.num_attention_heads, -1, -1)), dim=-1)
        largest_H = None
        if positions.clip_above is not None:
            largest_H = max_logits(q, k, self.scale, positions, self.kind)
        done = attend_natively(q, k, v_BHLv, positions.start_B, self.window, self.scale)
        return self._attend(q, k, v_BHLv, positions) if done is None else done, largest_H

    def _absorbed(self, q_nope: Tensor, q_rope: Tensor, keys_B1Ld: Tensor, positions: Positions) -> Tensor:
        """Decoding: q·(W_k c) = (W_kᵀ q)·c, so queries go to the latent instead of the latent to every head.

        d = R + r: a cached row is the key of every head, and its first R numbers are the value.
        """
        a = self.config
        up_HmR = self.kv_b_proj.weight.view(a.num_attention_heads, -1, a.kv_lora_rank)
        q = torch.cat((absorb(q_nope, up_HmR), q_rope), dim=-1)
        R = a.kv_lora_rank
        y_BHSR = attend_natively(q, keys_B1Ld, keys_B1Ld[..., :R], positions.start_B, self.window, self.scale)
        if y_BHSR is None:
            if better_in_float32(q):  # before the heads are expanded
                q, keys_B1Ld = q.float(), keys_B1Ld.float()
            k = keys_B1Ld.expand(-1, a.num_attention_heads, -1, -1)
            y_BHSR = self._attend(q, k, k[..., :R], positions).to(q_nope.dtype)
        return expand(y_BHSR, up_HmR, a.qk_nope_head_dim)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, positions: Positions) -> Tensor:
        mask = positions.mask_of(self.kind)
        causal = positions.causal and mask is None
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=self.scale)

    def _output(self, y_BHSv: Tensor) -> Tensor:
        B, H, S, v = y_BHSv.shape
        return self.o_proj(y_BHSv.transpose(1, 2).reshape(B, S, H * v))
