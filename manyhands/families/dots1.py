"""dots.llm1 (arXiv 2506.05767): DeepSeek-V3's router on grouped-query attention with QK-norm.

Source: transformers `models/dots1`.
"""

from manyhands.config import ModelConfig, parse
from manyhands.families.base import LLAMA_EXPERTS, Family, Json, Layout
from manyhands.families.deepseek import RENAME
from manyhands.families.deepseek_v3 import biased_sigmoid, biased_sigmoid_fields
from manyhands.families.fields import Fields, decoder_fields, head_fields, windows, written


def read(f: Fields) -> ModelConfig:
    f.absent(num_key_value_heads=32, sliding_window=4096, max_window_layers=62)
    f.activation()
    f.only("scoring_func", "noaux_tc", "sigmoid")
    f.only("topk_method", "noaux_tc")
    f.only("use_sliding_window", False, True)  # `sliding_window` and `max_window_layers` say it
    bias = f.flag("attention_bias", False)
    values = decoder_fields(f) | {
        "intermediate_size": f.integer("intermediate_size"),
        "attention": head_fields(f, qk_norm="head", attention_bias=bias, output_bias=bias, **windows(f, flag=False)),
        "rope": f.rope(),
        "moe": biased_sigmoid(f, renormalised=False),
    }
    f.close()
    return parse(ModelConfig, values, f.where)


def write(config: ModelConfig) -> Json:
    a = config.attention
    return written(config) | {
        "intermediate_size": config.intermediate_size,
        "attention_bias": a.attention_bias,
        "sliding_window": a.sliding_window,
        "max_window_layers": config.num_hidden_layers,
        "layer_types": config.layer_types,
        **biased_sigmoid_fields(config),
        "scoring_func": "sigmoid",  # transformers does not read it; llama.cpp refuses the publisher's "noaux_tc"
    }


DOTS1 = Family(
    model_type="dots1",
    architecture="Dots1ForCausalLM",
    published="dots.llm1",
    read=read,
    write=write,
    pieces=Layout(LLAMA_EXPERTS, RENAME),
)
