"""QK-Clip: when a head's attention logits grow past τ, shrink the weights that make them.

Letters: H query heads, G key/value heads, D model width. Source: Kimi K2, arXiv 2507.20534 §2.1.
"""

import torch
from torch import Tensor, nn

from manyhands.config import BuiltConfig, ModelConfig
from manyhands.config.attention import AttentionConfig
from manyhands.parallel.shards import local, share


def clips(config: BuiltConfig) -> bool:
    """Whether there is anything to clip: not in another kind of model than a decoder, and not behind a QK-norm."""
    return isinstance(config, ModelConfig) and config.attention.qk_norm == "none"


@torch.no_grad()
def qk_clip_(self_attn: nn.Module, max_logits_H: Tensor, tau: float, config: AttentionConfig) -> None:
    """Scale query and key rows in place so that head h's logits are multiplied by `γ_h = min(1, τ / S_h)`.

    Multi-head: rows of q_proj and k_proj times √γ_h.
    Grouped-query: heads share a key head, which takes √γ of the worst head of its group; each query head takes
    `γ_h / √γ_worst`. The product is exactly γ_h for every head, and one head per group is the multi-head rule.
    MLA: the unrotated parts of query (q_b_proj, or q_proj) and key (kv_b_proj) times √γ_h; the rotated part of the
    query times γ_h, because its key is shared by all heads and stays as it is. Values are never touched.
    Biases are scaled with their rows. γ = 1 leaves every weight bit-identical.

    With QK-norm the norm undoes any scale of its input, and what is frozen stays as it is: then nothing is done.

    Args:
        self_attn: an attention module with the projections named above.
        max_logits_H: `[H]`, S_h = the largest `q·k · scale` of the step, over the batch (and over ranks).
        tau: the largest logit allowed.
    """
    if config.qk_norm != "none":
        return
    gamma_H = torch.where(max_logits_H > tau, tau / max_logits_H, 1.0)
    rows = _mla(gamma_H, config) if config.kind == "mla" else _gqa(gamma_H, config)
    linears = {self_attn.get_submodule(name): factor for name, factor in rows.items()}
    if all(param.requires_grad for linear in linears for param in linear.parameters()):
        for linear, factor in linears.items():
            _scale_rows(linear, factor)


def _gqa(gamma_H: Tensor, config: AttentionConfig) -> dict[str, Tensor]:
    """Projection → a factor for each of its rows."""
    key_G = gamma_H.view(config.kv_heads, -1).amin(1).sqrt()  # query heads of one group are neighbours
    query_H = gamma_H / key_G.repeat_interleave(len(gamma_H) // len(key_G))
    return {
        "q_proj": query_H.repeat_interleave(config.head_dim),
        "k_proj": key_G.repeat_interleave(config.head_dim),
    }


def _mla(gamma_H: Tensor, config: AttentionConfig) -> dict[str, Tensor]:
    nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    root_H1, gamma_H1 = gamma_H.sqrt()[:, None], gamma_H[:, None]
    query_rows = torch.cat([root_H1.expand(-1, nope), gamma_H1.expand(-1, rope)], dim=1).flatten()
    key_rows = torch.cat([root_H1.expand(-1, nope), torch.ones_like(gamma_H1).expand(-1, value)], dim=1).flatten()
    return {"q_proj" if config.q_lora_rank is None else "q_b_proj": query_rows, "kv_b_proj": key_rows}


def _scale_rows(linear: nn.Module, factor: Tensor) -> None:
    """Multiply output i of `linear` (weight `[out, in]`, bias `[out]` if any) by `factor[i]`, on the rows held here."""
    assert isinstance(linear, nn.Linear)
    local(linear.weight).mul_(share(factor, linear.weight).to(linear.weight.dtype)[:, None])
    if linear.bias is not None:
        local(linear.bias).mul_(share(factor, linear.bias).to(linear.bias.dtype))
