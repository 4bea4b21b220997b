"""Counts at full size, to the last parameter: against known totals and against transformers on the meta device."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from manyhands.catalog import DecoderShape, load
from manyhands.config import EncoderDecoderConfig
from manyhands.plan.count_shape import count_shape, experts_in_model
from manyhands.plan.published import block_scales, counts_of, mtp_parameters

TOTALS = {
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_620_634_112,
    "deepseek-moe-16b": 16_375_728_128,
    "deepseek-v2-lite": 15_706_484_224,
    "deepseek-v2": 235_741_434_880,
    "deepseek-v3": 671_026_404_352,
    "kimi-k2": 1_026_408_209_408,
    "grok-1": 315_684_820_992,
    "qwen1.5-moe-a2.7b": 14_315_784_192,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "qwen3-coder-480b-a35b": 480_154_875_392,
    "olmoe-1b-7b": 6_919_161_856,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "minimax-m2": 228_689_748_992,
    "llama-2-70b": 68_976_648_192,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "t5-base": 222_903_552,
    "t5-xxl-1.1": 11_135_332_352,
    "switch-c": 1_571_375_798_688,
    "shazeer-moe-131072-h": 137_577_627_648,
}


@pytest.mark.parametrize("name", TOTALS)
def test_totals(name: str) -> None:
    counts = counts_of(load(name))
    assert counts is not None
    assert counts.total == sum(counts.by_component.values()) == TOTALS[name]
    assert counts.total >= counts.active >= counts.active_without_embedding >= counts.body


def test_deepseek_v3_and_what_is_stored_beside_it() -> None:
    entry = load("deepseek-v3")
    counts, config = counts_of(entry), entry.config
    assert counts is not None and config is not None
    assert counts.buffers == 58 * 256
    assert counts.total + counts.buffers == 671_026_419_200
    assert (counts.active, counts.active_without_embedding) == (37_552_282_624, 36_625_603_584)
    assert mtp_parameters(config) == 11_610_067_968
    assert block_scales(config) == 40_838_232


def test_the_three_active_counts_of_a_tied_and_an_untied_model() -> None:
    tied, untied = counts_of(load("grok-1")), counts_of(load("mixtral-8x7b"))
    assert tied is not None and untied is not None
    assert tied.active == tied.active_without_embedding == tied.body + tied.embedding
    assert untied.active == untied.active_without_embedding + untied.embedding == untied.body + 2 * untied.embedding


def test_experts_in_the_whole_model() -> None:
    shapes = {name: load(name).shape for name in ("switch-c", "gshard-2048e-36l", "dbrx", "qwen2.5-72b")}
    counts = {name: experts_in_model(shape) for name, shape in shapes.items() if shape is not None}
    assert counts == {"switch-c": 61_440, "gshard-2048e-36l": 36_864, "dbrx": 640, "qwen2.5-72b": 0}


def test_gshard_with_everything_beside_its_experts() -> None:
    """36 layers, 18 and 18: the paper's widths, written out (arXiv 2006.16668, appendix A.2)."""
    counts = counts_of(load("gshard-2048e-36l"))
    assert counts is not None
    network, attention = 2 * 1024 * 8192, 4 * 1024 * 16 * 128
    embeddings, norms = (64_000 + 32_000) * 1024, (18 * 2 + 18 * 3 + 2) * 2 * 1024
    beside = 18 * network + (18 + 2 * 18) * attention + 18 * 1024 * 2048 + norms
    assert counts.total == 18 * 2048 * network + beside + embeddings
    assert counts.body == 18 * 2 * network + beside
    assert counts.active_without_embedding == counts.body + 32_000 * 1024
    assert counts.embedding == embeddings


def _decoder(s: DecoderShape, **more: Any) -> dict[str, Any]:
    a = s.attention
    return {
        "vocab_size": s.vocab_size,
        "hidden_size": s.hidden_size,
        "num_hidden_layers": s.num_hidden_layers,
        "num_attention_heads": a.num_attention_heads,
        "num_key_value_heads": a.num_key_value_heads,
        "tie_word_embeddings": s.tie_word_embeddings,
        "pad_token_id": 0,
        **more,
    }


def _t5(s: EncoderDecoderConfig) -> dict[str, Any]:
    return {
        "vocab_size": s.vocab_size,
        "d_model": s.hidden_size,
        "d_kv": s.head_dim,
        "d_ff": s.intermediate_size,
        "num_layers": s.num_hidden_layers,
        "num_decoder_layers": s.num_decoder_layers,
        "num_heads": s.num_attention_heads,
        "tie_word_embeddings": s.tie_word_embeddings,
    }


def _dbrx(s: DecoderShape) -> dict[str, Any]:
    a, m = s.attention, s.moe
    assert m is not None
    ffn = {"ffn_hidden_size": m.moe_intermediate_size, "hidden_size": s.hidden_size}
    ffn |= {"moe_num_experts": m.num_experts, "moe_top_k": m.num_experts_per_tok}
    return {
        "d_model": s.hidden_size,
        "n_heads": a.num_attention_heads,
        "n_layers": s.num_hidden_layers,
        "vocab_size": s.vocab_size,
        "attn_config": {"kv_n_heads": a.num_key_value_heads, "clip_qkv": 8, "rope_theta": 5e5},
        "ffn_config": ffn,
        "tie_word_embeddings": False,
    }


def _gpt2(s: DecoderShape) -> dict[str, Any]:
    sizes = {"n_embd": s.hidden_size, "n_layer": s.num_hidden_layers, "n_head": s.attention.num_attention_heads}
    return {"vocab_size": s.vocab_size, "n_positions": s.position_embeddings, **sizes}


def _experts(s: DecoderShape) -> dict[str, Any]:
    assert s.moe is not None
    return {"num_local_experts": s.moe.num_experts, "num_experts_per_tok": s.moe.num_experts_per_tok}


def _phimoe(s: DecoderShape) -> dict[str, Any]:
    assert s.moe is not None
    width = s.moe.moe_intermediate_size
    return _decoder(s, **_experts(s), intermediate_size=width, attention_bias=True, lm_head_bias=True)


def _jetmoe(s: DecoderShape) -> dict[str, Any]:
    assert s.moe is not None
    fields = _decoder(s, **_experts(s), intermediate_size=s.moe.moe_intermediate_size, kv_channels=s.attention.head_dim)
    return {name: value for name, value in fields.items() if name != "num_attention_heads"}


def _jamba(s: DecoderShape) -> dict[str, Any]:
    assert s.moe is not None and s.mamba is not None
    where = {"expert_layer_period": 2, "expert_layer_offset": 1, "attn_layer_period": 8, "attn_layer_offset": 4}
    experts = {"num_experts": s.moe.num_experts, "num_experts_per_tok": s.moe.num_experts_per_tok}
    return _decoder(s, **where, **experts, intermediate_size=s.intermediate_size, mamba_dt_rank=s.mamba.time_step_rank)


def _switch(s: EncoderDecoderConfig) -> dict[str, Any]:
    assert s.router is not None
    sparse = {
        "num_sparse_encoder_layers": s.num_sparse_encoder_layers,
        "num_sparse_decoder_layers": s.num_sparse_decoder_layers,
        "num_experts": s.router.num_experts,
    }
    return _t5(s) | sparse


ORACLES: list[tuple[str, str, str, Callable[[Any], dict[str, Any]]]] = [
    ("t5-base", "T5ForConditionalGeneration", "T5Config", _t5),
    ("t5-11b", "T5ForConditionalGeneration", "T5Config", _t5),
    ("switch-base-128", "SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig", _switch),
    ("dbrx", "DbrxForCausalLM", "DbrxConfig", _dbrx),
    ("phi-3.5-moe", "PhimoeForCausalLM", "PhimoeConfig", _phimoe),
    ("jamba-v0.1", "JambaForCausalLM", "JambaConfig", _jamba),
    ("jetmoe-8b", "JetMoeForCausalLM", "JetMoeConfig", _jetmoe),
    ("qwen2.5-72b", "Qwen2ForCausalLM", "Qwen2Config", lambda s: _decoder(s, intermediate_size=s.intermediate_size)),
    ("gpt-3-175b", "GPT2LMHeadModel", "GPT2Config", _gpt2),
]


@pytest.mark.parametrize(("name", "model", "config", "fields"), ORACLES, ids=[row[0] for row in ORACLES])
def test_shapes_equal_transformers_at_full_size(
    name: str, model: str, config: str, fields: Callable[[Any], dict[str, Any]]
) -> None:
    transformers = pytest.importorskip("transformers")
    shape = load(name).shape
    assert shape is not None
    with torch.device("meta"):
        built = getattr(transformers, model)(getattr(transformers, config)(**fields(shape)))
    built.tie_weights()
    sizes = {id(parameter): parameter.numel() for parameter in built.parameters()}
    assert sum(sizes.values()) == count_shape(shape).total
