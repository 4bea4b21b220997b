"""A mixture's router: top-k routing, outside of training."""

import torch
from torch import nn

from manyhands.config import RouterConfig
from manyhands.kernels.moment import held
from manyhands.kernels.native import views
from manyhands.kernels.native.library import CRouter
from manyhands.moe import Router
from manyhands.runtime.builder import Unfit
from manyhands.runtime.coverage import Coverage

SCORE_CODES, GROUP_SCORES, FLOAT32 = {"softmax": 0, "sigmoid": 1}, {"max": 1, "top2_sum": 2}, (torch.float32,)
COVERED = Coverage(
    {
        **dict.fromkeys(("num_experts", "num_experts_per_tok", "norm_topk_prob", "norm_top1", "logit_bias", "bias")),
        **dict.fromkeys(("routed_scaling_factor", "n_group", "topk_group")),
        "select": ("topk",),
        "score": tuple(SCORE_CODES),
        "group_score": tuple(GROUP_SCORES),
        # these act in training only, where the kernels do not route
        **dict.fromkeys(("noisy", "jitter", "random_second", "init", "capacity_factor")),
        # these only with a capacity
        **dict.fromkeys(("min_capacity", "drop_policy", "capacity_per", "capacity_group")),
    },
    RouterConfig,
)
"""What the native kernels route; `eval_capacity_factor` and `capacity_tokens` they do not."""


def router_of(router: nn.Module, width: int, added: tuple[torch.Tensor, torch.Tensor] | None = None) -> CRouter:
    """A router whose config is covered and whose numbers lie as the kernels read them, for tokens of this width.

    `added` [E] of logits and choice are added in the place of its own.
    """
    if type(router) is not Router or not COVERED.covers(router.config):
        raise Unfit("a router that no claim covers")
    if router.training or not held(router, "weight", "bias", "e_score_correction_bias"):
        raise Unfit("a router in training, or whose weights are made anew")
    E = router.config.num_experts
    biases = [bias for bias in (router.bias, router.e_score_correction_bias) if bias is not None]
    plain = all(views.plain(bias, 1, FLOAT32) and bias.numel() == E for bias in biases)
    if not plain or not views.plain(router.weight, 2, FLOAT32) or router.weight.shape != (E, width):
        raise Unfit("a router that lies as the kernels do not read it")
    c = pointing_into(router)
    if added is not None:
        c.logit_bias, c.choice_bias = (t.data_ptr() for t in added)
    return c


def pointing_into(router: Router) -> CRouter:
    """The structure for a router that fits. Its weights must live as long."""
    c, tensors = router.config, (router.weight, router.bias, router.e_score_correction_bias)
    return CRouter(
        *(None if t is None else t.data_ptr() for t in tensors),
        *(c.num_experts, router.weight.shape[1], c.num_experts_per_tok, SCORE_CODES[c.score]),
        *(c.n_group, c.topk_group, GROUP_SCORES[c.group_score]),
        c.norm_topk_prob and (c.num_experts_per_tok > 1 or c.norm_top1),
        c.routed_scaling_factor,
    )
