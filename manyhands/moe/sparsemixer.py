"""SparseMixer-v2: two experts, each sampled near the best, with a gradient estimated for the choice itself.

Liu et al. 2024 (GRIN MoE, arXiv 2409.12136), the router of Phi-3.5-MoE. T tokens, E experts.
"""

import torch
from torch import Tensor

from manyhands.moe.routing import top_k_stable

MIDPOINT = 0.75  # Heun's third-order rule looks at two thirds of the way in one case of four
HEUN = 1.0 / 3.0


def sparsemixer(logits_TE: Tensor, epsilon: float, training: bool) -> tuple[Tensor, Tensor]:
    """Ids [T, 2] and weights [T, 2]: the second expert is found as the first, without it.

    Each weight is a softmax of its own, over the experts that may be chosen, so that the two do not sum to 1. In
    evaluation both are the best. Carries gradient to every logit that may be chosen.
    """
    first_T1, weight_T1 = _one(logits_TE, logits_TE, epsilon, training)
    others_TE = logits_TE.scatter(1, first_T1, float("-inf"))
    second_T1, other_T1 = _one(others_TE, logits_TE, epsilon, training)
    return torch.cat((first_T1, second_T1), 1), torch.cat((weight_T1, other_T1), 1)


def _one(open_TE: Tensor, logits_TE: Tensor, epsilon: float, training: bool) -> tuple[Tensor, Tensor]:
    """An expert [T, 1] of those whose `open_TE` is finite, and its weight [T, 1].

    While training the expert is sampled by its probability, and where it is not the best, its weight is a third in
    three cases of four, with the gradient of the whole: that is the estimator.
    """
    with torch.no_grad():
        best_id_T1 = top_k_stable(open_TE, 1)
        best_T1 = open_TE.gather(1, best_id_T1)
        far_TE = (best_T1 - logits_TE) / logits_TE.abs().clamp(min=best_T1) > 2.0 * epsilon
    near_TE = open_TE.masked_fill(far_TE, float("-inf"))
    gates_TE = near_TE.softmax(1)
    if not training:
        return best_id_T1, gates_TE.gather(1, best_id_T1)
    with torch.no_grad():  # Gumbel's way to draw by probability
        id_T1 = (near_TE - torch.empty_like(near_TE).exponential_().log()).argmax(1, keepdim=True)
        whole_T1 = (id_T1 == best_id_T1) | (torch.rand_like(best_T1) > MIDPOINT)
    weight_T1 = gates_TE.gather(1, id_T1)
    return id_T1, weight_T1 - weight_T1.detach() * torch.where(whole_T1, 0.0, 1.0 - HEUN)
