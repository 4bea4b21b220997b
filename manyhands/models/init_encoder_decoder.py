"""How an encoder-decoder is initialised: by the width of what a matrix takes in, not by depth.

Every matrix is N(0, (factor² / fan-in)), the queries' divided by √d besides, which stands for the 1/√d that attention
does not have; embeddings are N(0, factor²); norms are 1, biases 0. Routers are like other matrices, or follow their
config's `init`. Source: transformers `models/t5` (its `_init_weights`), which has it from Mesh TensorFlow. Two things
are otherwise: an untied head has fan-in D like every matrix (there: 1), and the experts' second matrix has fan-in F
(there: D). D model width, F expert width, d head width.
"""

from typing import TYPE_CHECKING

import torch
from torch import nn

from manyhands.layers.linear import Linear
from manyhands.layers.norm import RMSNorm
from manyhands.layers.relative_attention import RelativeBias
from manyhands.moe import Router
from manyhands.moe.bank import ExpertBank

if TYPE_CHECKING:
    from manyhands.models.encoder_decoder import EncoderDecoder


@torch.no_grad()
def fill(model: "EncoderDecoder", generator: torch.Generator | None) -> None:
    """Fill every parameter and buffer in place, in the order of `named_modules`. None: torch's own generator."""
    config = model.config
    factor, D, F = config.initializer_factor, config.hidden_size, config.intermediate_size
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            module.weight.normal_(0.0, factor, generator=generator)
        elif isinstance(module, Linear):
            std = factor * module.in_features**-0.5
            module.reset_parameters(std * config.head_dim**-0.5 if name.endswith("q_proj") else std, generator)
        elif isinstance(module, Router | RelativeBias):
            module.reset_parameters(factor * D**-0.5, generator)
        elif isinstance(module, ExpertBank):
            module.reset_parameters(factor * D**-0.5, factor * F**-0.5, generator)
        elif isinstance(module, RMSNorm):
            module.reset_parameters()
