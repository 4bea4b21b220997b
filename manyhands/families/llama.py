"""Llama 2, 3 and 3.1 (arXiv 2307.09288, 2407.21783): the dense decoder that most others are compared with."""

from manyhands.config import ModelConfig, parse
from manyhands.families.base import Family, Json, Layout
from manyhands.families.fields import Fields, decoder_fields, head_fields, written


def read(f: Fields) -> ModelConfig:
    f.activation()
    f.only("mlp_bias", False)
    bias = f.flag("attention_bias", False)
    values = decoder_fields(f) | {
        "intermediate_size": f.integer("intermediate_size"),
        "attention": head_fields(f, attention_bias=bias, output_bias=bias),
        "rope": f.rope(),
    }
    f.close()
    return parse(ModelConfig, values, f.where)


def write(config: ModelConfig) -> Json:
    return written(config) | {
        "intermediate_size": config.intermediate_size,
        "attention_bias": config.attention.attention_bias,
        "mlp_bias": False,
    }


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    published="Llama 2, Llama 3, Llama 3.1 (dense)",
    read=read,
    write=write,
    pieces=Layout(),
    dense=True,
)
