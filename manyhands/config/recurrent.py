"""A recurrent language model with mixtures between its LSTM layers (Shazeer et al. 2017, arXiv 1701.06538)."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from manyhands.config.model import AnyModelConfig, register
from manyhands.config.moe import PLACES, MoEConfig
from manyhands.config.numbers import Count, Layers, Size
from manyhands.config.router import MIXES_TOKENS, RouterConfig

_PAPERS_MOE = MoEConfig(
    router=RouterConfig(num_experts=32, num_experts_per_tok=4, noisy=True, init="zeros"),
    moe_intermediate_size=1024,
    hidden_act="relu",
)
"""Section 4 of the paper: MoE-32."""


@register
class RecurrentConfig(AnyModelConfig):
    """Embedding, LSTM layers as wide as the model, a mixture behind some of them, softmax. Defaults are the paper's."""

    kind: Literal["recurrent"] = "recurrent"
    vocab_size: Annotated[int, Field(strict=True, ge=0, le=1 << 24)] = 4096
    """0: neither embedding nor softmax is described. Such a model is counted, and not built."""
    hidden_size: Size = 512
    num_hidden_layers: Layers = 2
    """LSTM layers."""
    lstm_bias: bool = True
    moe: MoEConfig | None = _PAPERS_MOE
    moe_after: Annotated[tuple[Count, ...], Field(max_length=4096)] = (0,)
    """The LSTM layers, from 0, that a mixture of experts follows."""
    sigmoid_output: bool = True
    """The mixture's output goes through a sigmoid."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Of the output of the embedding, every LSTM layer and every mixture while training, before the layer's input is
    added to it."""
    tie_word_embeddings: bool = False

    def is_sparse(self, layer: int) -> bool:
        """Whether a mixture of experts follows LSTM layer `layer` (from 0)."""
        return self.moe is not None and layer in self.moe_after

    @property
    def sparse_layers(self) -> list[int]:
        """The numbers of the LSTM layers that a mixture follows, from 0."""
        return [layer for layer in range(self.num_hidden_layers) if self.is_sparse(layer)]

    @model_validator(mode="after")
    def _consistent(self) -> "RecurrentConfig":
        if self.moe is None:
            return self
        if self.moe.router.select == "soft":
            raise ValueError(MIXES_TOKENS)
        if not self.moe_after:
            raise ValueError("moe is set but moe_after names no layer that it follows")
        if beyond := [layer for layer in self.moe_after if layer >= self.num_hidden_layers]:
            raise ValueError(f"moe_after names LSTM layer {beyond[0]} of {self.num_hidden_layers} (from 0)")
        if len(set(self.moe_after)) < len(self.moe_after):
            raise ValueError(f"moe_after = {self.moe_after} names a layer twice")
        for name in PLACES:
            if getattr(self.moe, name) != MoEConfig.model_fields[name].default:
                raise ValueError(f"moe.{name} places the mixtures of a decoder; a recurrent model has moe_after")
        return self
