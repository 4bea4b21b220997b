"""How a model is initialised: the scales follow from its config and its depth; each part fills itself.

Matrices are N(0, initializer_range²); what writes into the residual stream is divided by √(2L), so that its variance
does not grow with depth (GPT-2). Norms are 1, biases 0. Routers follow their config.
"""

import math
from typing import TYPE_CHECKING

import torch

from manyhands.layers.linear import Linear
from manyhands.layers.norm import LayerNorm, RMSNorm
from manyhands.moe import Router
from manyhands.moe.bank import ExpertBank

if TYPE_CHECKING:
    from manyhands.models.build import AnyModel
    from manyhands.models.decoder import Decoder


def init_weights(model: "AnyModel", seed: int) -> None:
    """Fill every parameter and buffer in place. The same seed gives the same weights, whatever the global RNG."""
    model.reset_parameters(torch.Generator(device=model.embed_tokens.weight.device).manual_seed(seed))


@torch.no_grad()
def fill(model: "Decoder", generator: torch.Generator | None) -> None:
    """Fill every parameter and buffer in place, in the order of `named_parameters`. None: torch's own generator."""
    std = model.config.initializer_range
    residual_std = std / math.sqrt(2 * model.config.num_hidden_layers)
    for name, module in model.named_modules():
        own = residual_std if name.endswith(("o_proj", "down_proj")) else std
        if isinstance(module, Linear | Router):
            module.reset_parameters(own, generator)
        elif isinstance(module, ExpertBank):
            module.reset_parameters(std, residual_std, generator)
        elif isinstance(module, RMSNorm | LayerNorm):
            module.reset_parameters()
        else:
            for parameter, p in module.named_parameters(recurse=False):
                if parameter.endswith(("bias", "sinks")):
                    p.zero_()
                else:
                    p.normal_(0.0, own, generator=generator)
