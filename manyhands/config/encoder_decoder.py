"""An encoder-decoder: T5 (arXiv 1910.10683) and its sparse descendants Switch (2101.03961) and ST-MoE (2202.08906).

Described and counted; manyhands does not build this kind yet.
"""

from typing import Literal

from pydantic import model_validator

from manyhands.config.activation import Activation
from manyhands.config.model import AnyModelConfig, register
from manyhands.config.numbers import Count, Layers, Size
from manyhands.config.router import RouterConfig


@register
class EncoderDecoderConfig(AnyModelConfig):
    """RMSNorm, relative position biases, an attention of its own over the encoder's output in every decoder layer."""

    kind: Literal["encoder_decoder"] = "encoder_decoder"
    vocab_size: Size
    hidden_size: Size
    num_hidden_layers: Layers
    """The encoder's."""
    num_decoder_layers: Layers
    intermediate_size: Size
    """Width of every feed-forward network, and of every expert."""
    hidden_act: Activation = "relu"
    num_attention_heads: Size
    head_dim: Size
    relative_attention_num_buckets: Count = 32
    """Of the one table of relative positions that the encoder has, and of the decoder's."""
    tie_word_embeddings: bool = True
    router: RouterConfig | None = None
    """None: dense."""
    num_sparse_encoder_layers: Count = 0
    num_sparse_decoder_layers: Count = 0
    extra_encoder_networks: Count = 0
    """Dense feed-forward networks beyond one per layer: ST-MoE follows each sparse one with a dense one."""
    extra_decoder_networks: Count = 0

    @model_validator(mode="after")
    def _consistent(self) -> "EncoderDecoderConfig":
        for name, sparse, layers in (
            ("num_sparse_encoder_layers", self.num_sparse_encoder_layers, self.num_hidden_layers),
            ("num_sparse_decoder_layers", self.num_sparse_decoder_layers, self.num_decoder_layers),
        ):
            if sparse > layers:
                raise ValueError(f"{name} = {sparse} exceeds {layers} layers")
        if (self.router is None) != (not self.num_sparse_encoder_layers + self.num_sparse_decoder_layers):
            raise ValueError("router and the numbers of sparse layers go together")
        return self
