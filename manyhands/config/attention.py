"""Attention and its rotary position embedding."""

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from manyhands.config.base import Strict
from manyhands.config.numbers import Count, Multiplier, Multipliers, Rate, Rotations, Size

LayerType = Literal["full_attention", "sliding_attention", "chunked_attention"]


class RopeConfig(Strict):
    """Rotary position embedding: plain, linear interpolation, YaRN (arXiv 2309.00071), Llama 3.1's, or LongRoPE's
    (arXiv 2402.13753)."""

    rope_theta: Annotated[float, Field(gt=1.0, le=1e12)] = 10_000.0
    rope_type: Literal["default", "linear", "yarn", "llama3", "longrope"] = "default"
    factor: Annotated[float, Field(ge=1.0, le=1e4)] = 1.0
    original_max_position_embeddings: Size | None = None
    beta_fast: Rotations = 32.0
    beta_slow: Rotations = 1.0
    mscale: Rate | None = None
    mscale_all_dim: Rate | None = None
    attention_factor: Rate | None = None
    truncate: bool = True
    """YaRN: round the borders of its ramp to whole dimensions (gpt-oss does not)."""
    low_freq_factor: Rotations = 1.0
    high_freq_factor: Rotations = 4.0
    """llama3: wavelengths over original / low are divided by factor, those under original / high are kept."""
    short_factor: Multipliers | None = None
    """longrope: what each pair's frequency is divided by in a sequence of at most original_max_position_embeddings."""
    long_factor: Multipliers | None = None
    """The same in a longer one, for all of its tokens."""
    short_mscale: Multiplier | None = None
    """longrope: what cos and sin are multiplied by in a short sequence; null: √(1 + ln factor / ln original)."""
    long_mscale: Multiplier | None = None
    """The same in a long one."""
    partial_rotary_factor: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """The share of a head's width that is rotated, from its start (GLM-4.5: half)."""
    interleave: bool = False
    """Rotate adjacent pairs (DeepSeek's checkpoints) instead of the two halves (Llama)."""

    @model_validator(mode="after")
    def _consistent(self) -> "RopeConfig":
        if self.rope_type in ("yarn", "llama3", "longrope") and self.original_max_position_embeddings is None:
            raise ValueError(f"rope_type = {self.rope_type!r} needs original_max_position_embeddings")
        if self.rope_type == "llama3" and self.high_freq_factor < self.low_freq_factor:
            raise ValueError("rope_type = 'llama3' needs high_freq_factor >= low_freq_factor")
        for name in ("short_factor", "long_factor", "short_mscale", "long_mscale"):
            if self.rope_type != "longrope" and getattr(self, name) is not None:
                raise ValueError(f"{name} has no meaning with rope_type = {self.rope_type!r}; it goes with 'longrope'")
            if self.rope_type == "longrope" and name.endswith("_factor") and getattr(self, name) is None:
                raise ValueError(f"rope_type = 'longrope' needs {name}")
        if self.rope_type == "longrope" and self.original_max_position_embeddings == 1:
            raise ValueError("rope_type = 'longrope' needs original_max_position_embeddings >= 2")
        return self

    @property
    def mscales(self) -> tuple[float, float]:
        """longrope: what cos and sin are multiplied by in a short and in a long sequence, with the default resolved."""
        assert self.original_max_position_embeddings is not None
        usual = math.sqrt(1.0 + math.log(self.factor) / math.log(self.original_max_position_embeddings))
        short, long = (usual if m is None else m for m in (self.short_mscale, self.long_mscale))
        return short, long


class AttentionConfig(Strict):
    """Multi-head and grouped-query attention, or multi-head latent attention (MLA, arXiv 2405.04434)."""

    kind: Literal["gqa", "mla"] = "gqa"
    num_attention_heads: Size = 4
    num_key_value_heads: Size | None = None
    """gqa: defaults to num_attention_heads, which is plain multi-head attention."""
    head_dim: Size = 64
    qk_norm: Literal["none", "head", "full", "head_after_rope", "unweighted_after_rope"] = "none"
    """RMSNorm of queries and keys: per head (Qwen3), over the full projected width (OLMoE), per head after the
    rotation (Hunyuan), or so without weights and in no layer of `nope_layers` (Llama 4)."""
    attention_bias: bool = False
    """Biases on the query, key and value projections."""
    output_bias: bool = False
    sliding_window: Size | None = None
    """A token sees itself and the sliding_window - 1 tokens before it."""
    layer_types: tuple[LayerType, ...] | None = None
    """Which layers have the window or the chunks, one entry per layer (gpt-oss: every other one). None: all of them."""
    attention_chunk_size: Size | None = None
    """A token sees itself and those before it in its own chunk: positions 0 to attention_chunk_size - 1, and so on
    (Llama 4: 8192)."""
    nope_layers: Annotated[tuple[Count, ...], Field(max_length=4096)] = ()
    """Layers, from 0, that rotate nothing: they see the order of tokens by the mask alone (Llama 4: every fourth)."""
    floor_scale: Size | None = None
    """In `nope_layers`, the query at position p is multiplied by 1 + attn_scale·ln(1 + ⌊(p + 1) / floor_scale⌋), so
    that attention stays sharp in a long context (Llama 4: 8192)."""
    attn_scale: Multiplier = 0.1
    """How fast that factor grows."""
    sinks: bool = False
    """A learned logit per head that takes attention and gives no value (gpt-oss)."""
    attn_logit_softcap: Multiplier | None = None
    """Logits become cap·tanh(logits / cap) before the softmax (Grok-1: 30)."""
    attention_multiplier: Multiplier | None = None
    """What queries times keys are multiplied by, if not head_dim^-0.5 (Granite)."""
    q_lora_rank: Size | None = None
    kv_lora_rank: Size = 512
    qk_nope_head_dim: Size = 128
    qk_rope_head_dim: Size = 64
    v_head_dim: Size = 128
    latent_norm_eps: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """mla: epsilon of the two norms inside, if it is not rms_norm_eps (DeepSeek's is always 1e-6)."""

    @property
    def kv_heads(self) -> int:
        """Key/value heads, with the default resolved."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def rope_dim(self) -> int:
        """Width of the rotated part of a head."""
        return self.qk_rope_head_dim if self.kind == "mla" else self.head_dim

    @model_validator(mode="after")
    def _consistent(self) -> "AttentionConfig":
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"num_key_value_heads = {self.kv_heads} does not divide num_attention_heads = "
                f"{self.num_attention_heads}"
            )
        for kind, field in (("sliding_attention", "sliding_window"), ("chunked_attention", "attention_chunk_size")):
            if self.layer_types is not None and getattr(self, field) is None and kind in self.layer_types:
                raise ValueError(f"layer_types has {kind!r}, which needs {field}")
        if self.sliding_window is not None and self.attention_chunk_size is not None:
            raise ValueError("a model has a sliding_window or an attention_chunk_size, not both")
        if self.floor_scale is not None and not self.nope_layers:
            raise ValueError("floor_scale is for the layers that nope_layers names")
        if self.kind == "mla":
            if self.qk_norm != "none":
                raise ValueError("qk_norm cannot be used with kind = 'mla': the keys are never materialised")
            if self.num_key_value_heads not in (None, self.num_attention_heads):
                raise ValueError("num_key_value_heads has no meaning with kind = 'mla'")
            only_gqa = ("sinks", "attn_logit_softcap", "attention_multiplier", "attention_chunk_size", "nope_layers")
            for name in only_gqa:
                if getattr(self, name):
                    raise ValueError(f"{name} has no meaning with kind = 'mla'")
        return self

    def window(self, layer: int) -> int | None:
        """The sliding window of decoder layer `layer` (from 0); None where it has none."""
        return self.sliding_window if self._has(layer, "sliding_attention") else None

    def chunk(self, layer: int) -> int | None:
        """The length of the chunks of decoder layer `layer`; None where it has none."""
        return self.attention_chunk_size if self._has(layer, "chunked_attention") else None

    def layer_type(self, layer: int) -> LayerType:
        """What a token of decoder layer `layer` sees."""
        if self.window(layer) is not None:
            return "sliding_attention"
        return "full_attention" if self.chunk(layer) is None else "chunked_attention"

    def _has(self, layer: int, kind: LayerType) -> bool:
        return self.layer_types is None or self.layer_types[layer] == kind
