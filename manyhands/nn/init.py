"""All initialisation, in one place.

Matrices are N(0, initializer_range²); what writes into the residual stream is divided by √(2L), so that its variance
does not grow with depth (GPT-2). Norms are 1, biases 0. Routers follow their config.
"""

import math

import torch
from torch import nn

from manyhands.moe import Router
from manyhands.nn.decoder import Decoder
from manyhands.nn.norm import RMSNorm

SWITCH_SCALE = 0.1  # Fedus et al. 2021, table 3: a tenth of the usual variance keeps a sparse model stable


@torch.no_grad()
def init_weights(model: Decoder, seed: int) -> None:
    """Fill every parameter and buffer in place. The same seed gives the same weights, whatever the global RNG."""
    generator = torch.Generator(device=model.embed_tokens.weight.device).manual_seed(seed)
    config = model.config
    std = config.initializer_range
    residual_std = std / math.sqrt(2 * config.num_hidden_layers)
    routers = {id(p): m for m in model.modules() if isinstance(m, Router) for p in m.parameters()}
    norms = {id(m.weight) for m in model.modules() if isinstance(m, RMSNorm)}
    for name, p in model.named_parameters():
        if id(p) in routers:
            _init_router(routers[id(p)], p, std, generator)
        elif id(p) in norms:
            p.fill_(1.0)
        elif name.endswith(("bias", "sinks")):
            p.zero_()
        else:
            writes_residual = name.endswith(("o_proj.weight", "down_proj.weight", "down_proj"))
            p.normal_(0.0, residual_std if writes_residual else std, generator=generator)
    for router in model.modules():
        if isinstance(router, Router) and router.e_score_correction_bias is not None:
            router.e_score_correction_bias.zero_()


def _init_router(router: Router, p: nn.Parameter, std: float, generator: torch.Generator) -> None:
    if router.config.init == "zeros" or p is router.noise_weight or p is router.bias:
        p.zero_()
    elif router.config.init == "switch":
        sigma = math.sqrt(SWITCH_SCALE / p.shape[1])
        nn.init.trunc_normal_(p, 0.0, sigma, -2 * sigma, 2 * sigma, generator=generator)
    else:
        p.normal_(0.0, std, generator=generator)
