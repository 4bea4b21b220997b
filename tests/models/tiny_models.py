"""Small decoders of every kind, with weights that make attention and routing decisive."""

from typing import Any

import torch

from manyhands.config import AttentionConfig, ModelConfig, MoEConfig, RopeConfig, RouterConfig
from manyhands.models import Decoder, init_weights

V = 64

ATTENTION: dict[str, dict[str, Any]] = {
    "mha": {},
    "gqa": {"num_key_value_heads": 2},
    "mqa_biased": {"num_key_value_heads": 1, "attention_bias": True, "output_bias": True},
    "window": {"num_key_value_heads": 2, "sliding_window": 5},
    "norm_head": {"qk_norm": "head", "num_key_value_heads": 2},
    "norm_full": {"qk_norm": "full", "num_key_value_heads": 2},
    "mla": {"kind": "mla", "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6},
    "mla_low_rank_q": {
        "kind": "mla", "q_lora_rank": 10, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
        "v_head_dim": 6, "attention_bias": True,
    },
    "mla_window": {
        "kind": "mla", "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6,
        "sliding_window": 5,
    },
}  # fmt: skip

ROPE: dict[str, dict[str, Any]] = {
    "default": {},
    "interleaved": {"interleave": True},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "yarn": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 1.0,
        "mscale_all_dim": 0.5,
    },
}  # fmt: skip


def tiny(
    attention: str = "gqa",
    rope: str = "default",
    router: dict[str, Any] | None = None,
    seed: int = 0,
    **fields: Any,
) -> Decoder:
    """Three layers of width 32, the first dense. `moe=None` in fields makes it dense throughout."""
    moe = MoEConfig(
        router=RouterConfig(num_experts=6, **(router or {})), moe_intermediate_size=16, first_k_dense_replace=1
    )
    config = ModelConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        attention=AttentionConfig(**{"num_attention_heads": 4, "head_dim": 8, **ATTENTION[attention]}),
        rope=RopeConfig(**ROPE[rope]),
        **{"num_hidden_layers": 3, "moe": moe, "initializer_range": 0.2, **fields},
    )
    model = Decoder(config)
    init_weights(model, seed)
    g = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.uniform_(0.5, 1.5, generator=g)
            elif name.endswith("bias"):
                p.normal_(0.0, 0.3, generator=g)
    return model


def ids(B: int = 2, S: int = 12, seed: int = 3) -> torch.Tensor:
    return torch.randint(0, V, (B, S), generator=torch.Generator().manual_seed(seed))


def gradients(model: Decoder) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
