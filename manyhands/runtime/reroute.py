"""Edited routing in a program: between a native router and the experts, ids and weights are written over.

A mask is bias: -inf on the logits and on the choice. T tokens, K experts per token, E experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from manyhands.config import RouterConfig
from manyhands.moe import Router
from manyhands.moe.edit import Edit, Mask, masked, reroute
from manyhands.runtime.segments import Moment


@dataclass(frozen=True, slots=True, eq=False)
class Biases:
    """What a native router adds in the place of its own biases, filled before each step."""

    router: Router
    logit_E: Tensor
    choice_E: Tensor

    @staticmethod
    def of(router: Router) -> "Biases":
        """For a router that has the one, the other, both or none."""
        E = router.config.num_experts
        return Biases(router, torch.zeros(E), torch.zeros(E))

    def fill(self, edit: Edit | None) -> None:
        """The router's own, or nothing; -inf for what is off."""
        off_E = masked(edit, self.router.config.num_experts, self.logit_E.device)
        for own, to in ((self.router.bias, self.logit_E), (self.router.e_score_correction_bias, self.choice_E)):
            if own is None:
                to.zero_()
            else:
                to.copy_(own.detach())
            if off_E is not None:
                to[off_E] = float("-inf")


@dataclass(frozen=True, slots=True, eq=False)
class Reroute:
    """A segment: the routing of a layer as its edit wants it, in the buffers that the experts read."""

    layer: int
    config: RouterConfig
    ids: Tensor
    weights: Tensor
    scores: Tensor
    kept: Tensor

    def run(self, moment: Moment) -> None:
        """Only what is named is written; the router has written the rest."""
        edit, T = moment.edits.get(self.layer), moment.num_tokens
        self.kept[:T] = True
        if (off_E := masked(edit, self.config.num_experts, self.scores.device)) is not None:
            self.scores[:T].masked_fill_(off_E, 0.0)  # the native sigmoid of -inf is 6e-39
        if edit is None or isinstance(edit, Mask):
            return
        ids, weights, kept = reroute(edit, self.ids[:T], self.scores[:T], self._weigh)
        self.ids[:T], self.weights[:T] = ids, weights
        self.kept[:T] = ids >= 0 if kept is None else (ids >= 0) & kept
        moment.kept[self.layer] = self.kept[:T].clone()

    def _weigh(self, scores_TE: Tensor, ids_TK: Tensor) -> Tensor:
        """`moe.router.weigh` with its sum in the order of the native router: best first."""
        c, weights_TK = self.config, scores_TE.gather(1, ids_TK)
        if c.norm_topk_prob and (c.num_experts_per_tok > 1 or c.norm_top1):
            sum_T1 = torch.zeros_like(weights_TK[:, :1])
            for k in range(weights_TK.shape[1]):
                sum_T1 = sum_T1 + weights_TK[:, k : k + 1]
            weights_TK = weights_TK / (sum_T1 + 1e-20)
        return weights_TK * c.routed_scaling_factor


def follows(edit: Edit, config: RouterConfig) -> bool:
    """Whether a native router does it: one that adds a group's two best wants two that are not off."""
    if not isinstance(edit, Mask) or config.n_group == 1 or config.group_score != "top2_sum":
        return True
    size = config.num_experts // config.n_group
    left = [size] * config.n_group
    for expert in set(edit.experts):
        left[expert // size] -= 1
    return size < 2 or 1 not in left
