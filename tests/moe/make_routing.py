"""Routers with chosen weights, and routings from chosen logits."""

from typing import Any

import torch
from torch import Tensor

from manyhands.config import MoEConfig, RouterConfig
from manyhands.moe import MoELayer, Router, Routing


def make_router(D: int = 8, seed: int = 0, **fields: Any) -> Router:
    """A router whose weights are N(0, 1): decisive choices."""
    router = Router(RouterConfig(**fields), D)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in router.parameters():
            p.normal_(generator=g)
    return router


def route_logits(logits: Any, **fields: Any) -> Routing:
    """The routing of tokens with these logits [T, E]: an identity router on them. In evaluation unless `train`."""
    z = torch.as_tensor(logits, dtype=torch.float32)
    train, mask, bias = fields.pop("train", False), fields.pop("mask", None), fields.pop("bias_values", None)
    E = z.shape[1]
    router = Router(RouterConfig(num_experts=E, bias=bias is not None, **fields), E)
    with torch.no_grad():
        router.weight.copy_(torch.eye(E))
        if router.noise_weight is not None:
            router.noise_weight.zero_()
        if bias is not None:
            router.e_score_correction_bias.copy_(torch.tensor(bias))
    router.train(train)
    return router(z.requires_grad_(), None if mask is None else torch.tensor(mask))


def logit(p: Any) -> Tensor:
    """Inverse sigmoid."""
    return torch.as_tensor(p, dtype=torch.float64).logit().float()


def routing_from(ids: Any, scores: Any, mask: Any = None, weights: Any = None) -> Routing:
    """A routing written down by hand."""
    ids, scores = torch.as_tensor(ids), torch.as_tensor(scores, dtype=torch.float32)
    w = scores.gather(1, ids.clamp(min=0)) if weights is None else torch.as_tensor(weights)
    mask = torch.ones(len(ids), dtype=torch.bool) if mask is None else torch.as_tensor(mask)
    return Routing(ids, w, scores, scores.log(), ids >= 0, mask)


def make_layer(D: int = 8, F: int = 8, seed: int = 0, implementation: str = "auto", **fields: Any) -> MoELayer:
    """A layer with N(0, 1/√fan-in) experts; `router` holds the router's fields, the rest is MoEConfig's."""
    config = MoEConfig(router=RouterConfig(**fields.pop("router", {})), moe_intermediate_size=F, **fields)
    layer = MoELayer(config, D, implementation)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in layer.named_parameters():
            p.normal_(0.0, 1.0 if "router" in name or "bias" in name else p.shape[-1] ** -0.5, generator=g)
    return layer


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
