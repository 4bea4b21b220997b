"""Llama 4 Scout and Maverick, their language model: one expert per token whose input is weighed, a shared expert.

Three layers of four rotate and attend within chunks; every fourth does neither, and multiplies its queries by a factor
that grows with the position. Source: transformers `models/llama4`; in files the experts are [E, D, 2F] and [E, F, D].
transformers numbers padding too where it computes that factor; here real tokens are counted.

`llama4` has the language model's fields under `text_config`, its tensors under `language_model.`, and a vision tower,
which is not computed with and which a round trip keeps. `llama4_text` is the language model alone.
"""

from collections.abc import Iterator
from dataclasses import replace

from manyhands.config import ModelConfig, parse
from manyhands.families.base import Family, Json, Layout, Piece
from manyhands.families.fields import Fields, decoder_fields, head_fields, written

_RENAME = {
    "mlp.shared_experts.": "feed_forward.shared_expert.",
    "mlp.": "feed_forward.",
}


def read(f: Fields) -> ModelConfig:
    f.absent(num_key_value_heads=8, head_dim=128, attention_chunk_size=8192)
    f.activation()
    f.only("for_llm_compression", False)
    layers = f.integer("num_hidden_layers")
    numbers = range(min(max(layers, 0), 4096))
    rotates = _rotating(f, layers)
    types = f.layers("layer_types", layers)
    types = types or ["chunked_attention" if rotates[n] else "full_attention" for n in numbers]
    chunk, bias = f.integer("attention_chunk_size", None), f.flag("attention_bias", False)
    tuned, floor, growth = _tuned(f), f.integer("floor_scale", 8192), f.number("attn_scale", 0.1)
    nope = [n for n in numbers if not rotates[n]]
    width = f.integer("intermediate_size")
    moe = {
        "router": {
            "num_experts": f.integer("num_local_experts"),
            "num_experts_per_tok": f.only("num_experts_per_tok", 1),
            "score": "sigmoid",
            "norm_topk_prob": False,
        },
        "weigh": "input",
        "moe_intermediate_size": width,
        "n_shared_experts": 1,
        **_sparse(f, layers),
    }
    values = decoder_fields(f, eps=1e-5) | {
        "intermediate_size": f.integer("intermediate_size_mlp", 16384),
        "attention": head_fields(
            f,
            attention_bias=bias,
            output_bias=bias,
            qk_norm="unweighted_after_rope" if f.flag("use_qk_norm", True) else "none",
            layer_types=types if "chunked_attention" in types else None,
            attention_chunk_size=chunk if "chunked_attention" in types else None,
            nope_layers=nope,
            **({"floor_scale": floor, "attn_scale": growth} if tuned and nope else {}),
        ),
        "rope": f.rope(500_000.0, interleave=True),
        "moe": moe,
    }
    f.close()
    return parse(ModelConfig, values, f.where)


def _rotating(f: Fields, layers: int) -> list[bool]:
    """Layer by layer; the field's name says the opposite of its entries: 1 is a layer that rotates."""
    period = f.integer("no_rope_layer_interval", 4)
    if not f.values.get("no_rope_layers"):
        f.ignore("no_rope_layers")
        if period < 1:
            raise f.wrong("no_rope_layer_interval", "at least 1")
        return [(n + 1) % period != 0 for n in range(min(max(layers, 0), 4096))]
    listed = f.layers("no_rope_layers", layers) or []
    if any(entry not in (0, 1) for entry in listed):
        raise f.wrong("no_rope_layers", "expected 1 for a layer that rotates, 0 for one that does not")
    return [entry == 1 for entry in listed]


def _tuned(f: Fields) -> bool:
    """Whether queries are multiplied by position; early files say 4 for true."""
    return bool(f.only("attn_temperature_tuning", True, False, 4))


def _sparse(f: Fields, layers: int) -> Json:
    """Which layers have experts: a list, or every n-th."""
    step, listed = f.integer("interleave_moe_layer_step", 1), f.take("moe_layers", None)
    if listed is None:
        return {"decoder_sparse_step": step}
    if not isinstance(listed, list) or any(isinstance(n, bool) or not isinstance(n, int) for n in listed):
        raise f.wrong("moe_layers", "expected a list of layer numbers")
    return {"mlp_only_layers": [n for n in range(min(max(layers, 0), 4096)) if n not in listed]}


def write(config: ModelConfig) -> Json:
    assert config.moe is not None
    a = config.attention
    return written(config) | {
        "intermediate_size": config.moe.moe_intermediate_size,
        "intermediate_size_mlp": config.intermediate_size,
        "num_local_experts": config.moe.router.num_experts,
        "num_experts_per_tok": config.moe.router.num_experts_per_tok,
        "moe_layers": config.sparse_layers,
        "interleave_moe_layer_step": 1,
        "attention_bias": a.attention_bias,
        "use_qk_norm": a.qk_norm == "unweighted_after_rope",
        "no_rope_layers": [int(n not in a.nope_layers) for n in range(config.num_hidden_layers)],
        "layer_types": config.layer_types,
        "attention_chunk_size": a.attention_chunk_size,
        "attn_temperature_tuning": a.floor_scale is not None,
        "floor_scale": a.floor_scale or 8192,
        "attn_scale": a.attn_scale,
    }


def _experts(tail: str, where: str, config: ModelConfig) -> Iterator[Piece]:
    yield Piece("", where + tail.replace("mlp.", "feed_forward.", 1), transpose=True)


LLAMA4_TEXT = Family(
    model_type="llama4_text",
    architecture="Llama4ForCausalLM",
    published="Llama 4 (language model by itself)",
    read=read,
    write=write,
    pieces=Layout(_experts, _RENAME),
)
LLAMA4 = replace(
    LLAMA4_TEXT,
    model_type="llama4",
    architecture="Llama4ForConditionalGeneration",
    published="Llama 4 Scout, Llama 4 Maverick (language model)",
    write=lambda config: write(config) | {"model_type": "llama4_text", "architectures": ["Llama4ForCausalLM"]},
    pieces=Layout(_experts, _RENAME, prefix="language_model.model.", head="language_model.lm_head.weight"),
    nearest=False,
    kept=lambda _: ("vision_model.", "multi_modal_projector."),
    text_field="text_config",
)
