"""Grok-1's maths in plain torch, float64, from the published model (xai-org/grok-1, `model.py`).

    x = embedding · multiplier
    x = x + norm(attention(norm(x)));  x = x + norm(mixture(norm(x)))
    logits = norm(x) · embedding · multiplier

Attention logits are scaled, then 30·tanh(·/30); an expert is linear_1(gelu(linear x) ⊙ linear_v x) with JAX's default,
tanh, GELU; router probabilities are a float32 softmax over all experts, of which the two largest count as they are.

B batch, S sequence, D width, H query heads, G key/value heads, d head width, E experts, K chosen.
"""

from typing import Any

import torch
from torch import Tensor

from .references import Chosen, positions

Weights = dict[str, Tensor]


def grok_logits(w: Weights, config: dict[str, Any], ids_BS: Tensor, mask_BS: Tensor) -> tuple[Tensor, Chosen]:
    """Logits and chosen experts. `w` holds tensors by the names of the file."""
    x = w["model.embed_tokens.weight"][ids_BS] * config["embedding_multiplier_scale"]
    chosen: Chosen = {}
    for layer in range(config["num_hidden_layers"]):
        here = {n.split(".", 3)[3]: t for n, t in w.items() if n.startswith(f"model.layers.{layer}.")}
        x = x + _norm(
            _attend(here, config, _norm(x, here["pre_attn_norm.scale"]), mask_BS), here["post_attn_norm.scale"]
        )
        mixed, chosen[layer] = _mix(here, config, _norm(x, here["pre_moe_norm.scale"]))
        x = x + _norm(mixed, here["post_moe_norm.scale"])
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return _norm(x, w["model.norm.scale"]) @ head.T * config["output_multiplier_scale"], chosen


def _norm(x: Tensor, scale: Tensor) -> Tensor:
    return scale * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def _rotate(x_BSHd: Tensor, position_BS: Tensor) -> Tensor:
    half = x_BSHd.shape[-1] // 2
    angle = position_BS[..., None] * 10_000.0 ** -(torch.arange(half, dtype=x_BSHd.dtype) / half)
    cos, sin = angle.cos()[:, :, None], angle.sin()[:, :, None]
    first, second = x_BSHd[..., :half], x_BSHd[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def _attend(w: Weights, config: dict[str, Any], x_BSD: Tensor, mask_BS: Tensor) -> Tensor:
    B, S, D = x_BSD.shape
    H, G = config["num_attention_heads"], config["num_key_value_heads"]
    q, k, v = ((x_BSD @ w[f"attn.{n}_proj.weight"].T).view(B, S, -1, D // H) for n in "qkv")
    q, k = (_rotate(t, positions(mask_BS)) for t in (q, k))
    k, v = (t.repeat_interleave(H // G, dim=2) for t in (k, v))
    logits = torch.einsum("bshd,bthd->bhst", q, k) * config["attn_output_multiplier"]
    logits = 30 * (logits / 30).tanh()
    seen = torch.ones(S, S, dtype=torch.bool).tril() & mask_BS.bool()[:, None, None]
    weights = torch.where(seen, logits, -1e30).softmax(-1)
    return torch.einsum("bhst,bthd->bshd", weights, v).reshape(B, S, -1) @ w["attn.o_proj.weight"].T


def _mix(w: Weights, config: dict[str, Any], x_BSD: Tensor) -> tuple[Tensor, Tensor]:
    x_TD = x_BSD.flatten(0, 1)
    scores_TE = (x_TD @ w["moe_block.gate.weight"].T).float().softmax(-1)
    weights_TK, ids_TK = scores_TE.topk(config["num_experts_per_tok"])
    y_TD = torch.zeros_like(x_TD)
    for e in range(config["num_experts"]):
        gate, up, down = (w[f"moe_block.experts.{e}.{n}.weight"] for n in ("linear", "linear_v", "linear_1"))
        hidden = torch.nn.functional.gelu(x_TD @ gate.T, approximate="tanh") * (x_TD @ up.T)
        y_TD = y_TD + (weights_TK * (ids_TK == e)).sum(-1, keepdim=True) * (hidden @ down.T)
    return y_TD.view_as(x_BSD), ids_TK
