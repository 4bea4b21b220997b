"""A small encoder-decoder of the same kind: every mechanism kept, every size reduced."""

from typing import Any

from manyhands.check.shrink import WIDTHS, shrink_router
from manyhands.config import EncoderDecoderConfig


def shrink_encoder_decoder(config: EncoderDecoderConfig) -> EncoderDecoderConfig:
    """At most 64 wide, 16 experts; two layers in each stack, one of them sparse where not all are.

    The heads' inner width stays different from the model's where it is. Buckets of relative positions are few, so that
    short sequences reach the far ones. A small model comes back with what it has of each.
    """
    heads = min(config.num_attention_heads, 4)
    inner = config.num_attention_heads * config.head_dim
    changes: dict[str, Any] = {name: min(getattr(config, name), limit) for name, limit in WIDTHS.items()}
    head_dim = min(config.head_dim, 16)
    if (heads * head_dim == changes["hidden_size"]) != (inner == config.hidden_size):
        head_dim = 12 if head_dim > 12 else head_dim
    changes |= {
        "num_attention_heads": heads,
        "head_dim": head_dim,
        "relative_attention_num_buckets": min(config.relative_attention_num_buckets, 8),
        "relative_attention_max_distance": min(config.relative_attention_max_distance, 20),
    }
    for side, layers, sparse in (
        ("encoder", "num_hidden_layers", config.sparse_encoder_layers),
        ("decoder", "num_decoder_layers", config.sparse_decoder_layers),
    ):
        count = getattr(config, layers)
        kept = min(count, 2)
        changes[layers] = kept
        wanted = kept if len(sparse) == count else min(len(sparse), 1)
        changes[f"num_sparse_{side}_layers"] = wanted
        changes[f"extra_{side}_networks"] = wanted if getattr(config, f"extra_{side}_networks") else 0
    if config.router is not None:
        changes["router"] = shrink_router(config.router)
    return EncoderDecoderConfig.model_validate(config.model_copy(update=changes).model_dump())
