"""A decoder-only language model."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from manyhands.config.activation import Activation
from manyhands.config.attention import AttentionConfig, RopeConfig
from manyhands.config.model import BUILT, DECODER, AnyModelConfig, not_built, register
from manyhands.config.moe import MoEConfig
from manyhands.config.numbers import Layers, Multiplier, Size
from manyhands.config.router import MIXES_TOKENS
from manyhands.errors import ConfigError

INITIALIZER_RANGE = 0.02
"""Standard deviation of a fresh matrix (GPT-2, Radford et al. 2019), unless a config names another."""


@register
class ModelConfig(AnyModelConfig):
    """A decoder-only language model, dense (`moe` is None) or sparse."""

    kind: Literal["decoder"] = Field(default="decoder", exclude=True, repr=False)
    """A file without a kind describes a decoder, so none is written for one."""
    vocab_size: Size = 4096
    hidden_size: Size = 256
    num_hidden_layers: Layers = 4
    intermediate_size: Size = 1024
    """Width of the dense feed-forward networks."""
    hidden_act: Activation = "swiglu"
    max_position_embeddings: Size = 2048
    norm: Literal["rms_norm", "layer_norm"] = "rms_norm"
    """How what enters each block, and the head, is normalised: `layer_norm` subtracts the mean too, and has a bias
    (Phi-3.5-MoE). Norms of queries, keys and latents are RMS norms in any case."""
    rms_norm_eps: Annotated[float, Field(gt=0.0, le=1.0)] = 1e-6
    initializer_range: Annotated[float, Field(gt=0.0, le=10.0)] = INITIALIZER_RANGE
    tie_word_embeddings: bool = False
    lm_head_bias: bool = False
    """A learned bias on the logits of the vocabulary (Phi-3.5-MoE)."""
    output_norms: bool = False
    """Also normalise what attention and feed-forward give, before it is added (Grok-1's four norms)."""
    embedding_multiplier: Multiplier = 1.0
    residual_multiplier: Multiplier = 1.0
    """What each block's contribution is multiplied by before it is added (Granite)."""
    output_multiplier: Multiplier = 1.0
    """What the logits are multiplied by (Grok-1; the inverse of Granite's logits_scaling)."""
    attention: AttentionConfig = AttentionConfig()
    rope: RopeConfig = RopeConfig()
    moe: MoEConfig | None = None

    def is_sparse(self, layer: int) -> bool:
        """Whether decoder layer `layer` (from 0) is a mixture of experts."""
        return self.moe is not None and self.moe.is_sparse(layer)

    @property
    def rope_dim(self) -> int:
        """Width of the rotated part of a head."""
        return int(self.attention.rope_dim * self.rope.partial_rotary_factor)

    @property
    def longest_continued(self) -> int:
        """Tokens of the longest sequence that can be computed token by token.

        Past the original length LongRoPE turns the earlier tokens otherwise too, so that what is cached of them is
        wrong; a longer sequence is computed at once.
        """
        original = self.rope.original_max_position_embeddings if self.rope.rope_type == "longrope" else None
        return min(self.max_position_embeddings, original or self.max_position_embeddings)

    @property
    def sparse_layers(self) -> list[int]:
        """The numbers of the sparse layers, from 0."""
        return [layer for layer in range(self.num_hidden_layers) if self.is_sparse(layer)]

    @property
    def dense_layers(self) -> list[int]:
        """The numbers of the layers that are not sparse, from 0."""
        return [layer for layer in range(self.num_hidden_layers) if not self.is_sparse(layer)]

    @property
    def layer_types(self) -> list[str]:
        """`full_attention`, `sliding_attention` or `chunked_attention`, layer by layer."""
        return [self.attention.layer_type(layer) for layer in range(self.num_hidden_layers)]

    @field_validator("kind", mode="before")
    @classmethod
    def _decoder(cls, kind: Any) -> Any:
        if kind != DECODER:
            raise ValueError(not_built(kind))
        return kind

    @model_validator(mode="after")
    def _consistent(self) -> "ModelConfig":
        if self.moe is not None and self.moe.router.select == "soft":
            raise ValueError(MIXES_TOKENS)
        if self.moe is not None and not self.sparse_layers:
            raise ValueError(
                f"moe is set but no layer is sparse: first_k_dense_replace = {self.moe.first_k_dense_replace}, "
                f"decoder_sparse_step = {self.moe.decoder_sparse_step}, num_hidden_layers = {self.num_hidden_layers}"
            )
        if self.moe is not None and (beyond := [n for n in self.moe.mlp_only_layers if n >= self.num_hidden_layers]):
            raise ValueError(f"mlp_only_layers names layer {beyond[0]} of {self.num_hidden_layers} (from 0)")
        types = self.attention.layer_types
        if types is not None and len(types) != self.num_hidden_layers:
            raise ValueError(f"layer_types has {len(types)} entries for num_hidden_layers = {self.num_hidden_layers}")
        if beyond := [layer for layer in self.attention.nope_layers if layer >= self.num_hidden_layers]:
            raise ValueError(f"nope_layers names layer {beyond[0]} of {self.num_hidden_layers} (from 0)")
        if not self.rope_dim or self.rope_dim % 2:
            raise ValueError(f"the rotated head width is {self.rope_dim}; it must be even, and not 0")
        for name in ("short_factor", "long_factor"):
            factors = getattr(self.rope, name)
            if factors is not None and len(factors) != self.rope_dim // 2:
                raise ValueError(
                    f"rope.{name} has {len(factors)} entries; the rotated head width {self.rope_dim} needs "
                    f"{self.rope_dim // 2}"
                )
        if self.lm_head_bias and self.tie_word_embeddings:
            raise ValueError("lm_head_bias needs a head of its own: tie_word_embeddings = false")
        return self


def as_decoder(config: AnyModelConfig, what: str = "this class") -> ModelConfig:
    """`config`, if it describes a decoder. Raises `ConfigError` for another kind, saying that `what` is not for it."""
    if isinstance(config, ModelConfig):
        return config
    if config.kind in BUILT:
        raise ConfigError(f"kind = {config.kind!r}: {what} is for decoders only")
    raise ConfigError(f"kind = {config.kind!r}: {not_built(config.kind)}")
