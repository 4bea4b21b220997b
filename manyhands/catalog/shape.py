"""Layer shapes of systems that no configuration describes: enough to count every parameter, and no more.

A system that one of `manyhands.families` reads has that family's `config.json` fields instead, and one whose kind of
model is described has its configuration: encoder-decoders and recurrent models.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from manyhands.config import EncoderDecoderConfig, LocalExpertsConfig, RecurrentConfig, Strict

Size = Annotated[int, Field(strict=True, ge=1, le=1 << 24)]
Count = Annotated[int, Field(strict=True, ge=0, le=1 << 24)]


class AttentionShape(Strict):
    """Multi-head or grouped-query attention."""

    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Size
    attention_bias: bool = False
    output_bias: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"
    layers: Size | None = None
    """How many layers have attention; None: all of them (Jamba: one in eight)."""
    sliding_window: Size | None = None
    window_layers: Count = 0
    chunked: bool = False
    """`sliding_window` is the length of chunks, each attended alone (Llama 4)."""
    num_experts: Count = 0
    """JetMoE: experts that own a query and an output projection and share one key and value projection."""
    num_experts_per_tok: Count = 0


class MambaShape(Strict):
    """Jamba's state-space layer (Mamba, with RMSNorm of Δ, B and C)."""

    layers: Size
    inner_size: Size
    state_size: Size
    conv_kernel: Size
    time_step_rank: Size


class MoEShape(Strict):
    """The sparse layers."""

    layers: Size
    num_experts: Size
    num_experts_per_tok: Size
    moe_intermediate_size: Size
    gated: bool = True
    shared_intermediate_size: Count = 0
    """Width of the feed-forward that every token visits in addition to its experts."""
    residual_intermediate_size: Count = 0
    """Width of a dense network in parallel with the whole sparse layer (Arctic)."""
    output_bias: bool = False
    """One bias on the combined output (JetMoE)."""
    selection_bias: bool = False
    """A bias per expert that no gradient trains; saved, and not a parameter."""

    @model_validator(mode="after")
    def _consistent(self) -> "MoEShape":
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(f"num_experts_per_tok = {self.num_experts_per_tok} exceeds {self.num_experts} experts")
        return self


class DecoderShape(Strict):
    """A decoder-only model. Layers that are not sparse have a dense feed-forward network."""

    kind: Literal["decoder"] = "decoder"
    num_hidden_layers: Size
    hidden_size: Size
    vocab_size: Size
    tie_word_embeddings: bool = False
    position_embeddings: Count = 0
    """Learned positions (GPT-3)."""
    attention: AttentionShape
    mamba: MambaShape | None = None
    intermediate_size: Count = 0
    gated: bool = True
    mlp_bias: bool = False
    moe: MoEShape | None = None
    norms_per_layer: Count = 2
    norm_bias: bool = False
    head_bias: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> "DecoderShape":
        if self.moe is not None and self.moe.layers > self.num_hidden_layers:
            raise ValueError(f"moe.layers = {self.moe.layers} exceeds num_hidden_layers = {self.num_hidden_layers}")
        if self.dense_layers and not self.intermediate_size:
            raise ValueError(f"{self.dense_layers} dense layers need an intermediate_size")
        return self

    @property
    def dense_layers(self) -> int:
        """How many layers are not sparse."""
        return self.num_hidden_layers - (self.moe.layers if self.moe else 0)


class TranslatorShape(Strict):
    """An encoder-decoder with a vocabulary for each side, every second layer of both stacks sparse (GShard).

    Sinusoidal positions, so none are counted; the head is the target's embedding.
    """

    kind: Literal["translator"] = "translator"
    num_encoder_layers: Size
    num_decoder_layers: Size
    hidden_size: Size
    intermediate_size: Size
    """Width of a dense feed-forward network and of an expert; neither is gated."""
    num_attention_heads: Size
    head_dim: Size
    source_vocab_size: Size
    target_vocab_size: Size
    num_experts: Size
    num_experts_per_tok: Size

    @property
    def sparse_layers(self) -> int:
        """Of both stacks."""
        return self.num_encoder_layers // 2 + self.num_decoder_layers // 2


Shape = DecoderShape | EncoderDecoderConfig | RecurrentConfig | LocalExpertsConfig | TranslatorShape
