"""Qwen3, dense (arXiv 2505.09388): Llama with RMSNorm of each query and key head.

Source: transformers `models/qwen3`.
"""

from manyhands.config import ModelConfig, parse
from manyhands.families.base import Family, Json, Layout
from manyhands.families.fields import Fields, decoder_fields, head_fields, windows, written


def read(f: Fields) -> ModelConfig:
    f.absent(num_key_value_heads=32, head_dim=128, sliding_window=4096, max_window_layers=28)
    f.activation()
    bias = f.flag("attention_bias", False)
    values = decoder_fields(f) | {
        "intermediate_size": f.integer("intermediate_size"),
        "attention": head_fields(f, qk_norm="head", attention_bias=bias, output_bias=bias, **windows(f)),
        "rope": f.rope(),
    }
    f.close()
    return parse(ModelConfig, values, f.where)


def write(config: ModelConfig) -> Json:
    a = config.attention
    return written(config) | {
        "intermediate_size": config.intermediate_size,
        "attention_bias": a.attention_bias,
        "use_sliding_window": a.sliding_window is not None,
        "sliding_window": a.sliding_window,
        "layer_types": config.layer_types,
    }


QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    published="Qwen3 0.6B to 32B (dense)",
    read=read,
    write=write,
    pieces=Layout(),
    dense=True,
)
