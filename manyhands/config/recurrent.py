"""A recurrent model with one mixture between LSTM layers (Shazeer et al. 2017, arXiv 1701.06538).

Described and counted; manyhands does not build this kind yet.
"""

from typing import Literal

from pydantic import model_validator

from manyhands.config.activation import Activation
from manyhands.config.model import AnyModelConfig, register
from manyhands.config.numbers import Layers, Size


@register
class RecurrentConfig(AnyModelConfig):
    """LSTM layers as wide as the model and a hierarchical mixture; embedding and softmax are not described."""

    kind: Literal["recurrent"] = "recurrent"
    hidden_size: Size
    num_hidden_layers: Layers
    """LSTM layers."""
    num_experts: Size
    num_experts_per_tok: Size
    moe_intermediate_size: Size
    hidden_act: Activation = "relu"
    n_group: Size
    """The first level of the hierarchy chooses among this many groups of experts."""
    topk_group: Size

    @model_validator(mode="after")
    def _consistent(self) -> "RecurrentConfig":
        if self.num_experts % self.n_group:
            raise ValueError(f"n_group = {self.n_group} does not divide num_experts = {self.num_experts}")
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group = {self.topk_group} exceeds n_group = {self.n_group}")
        return self
