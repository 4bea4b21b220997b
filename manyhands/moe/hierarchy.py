"""The two-level gate of Shazeer et al. 2017 (arXiv 1701.06538, appendix B): groups first, then experts within each.

    y = Σ_i G^p_i Σ_j G^i_j E_ij

Both gates are softmaxes over what they chose. The first level is a `Routing` of its own, whose experts are the groups.

T tokens, K experts per token, E experts, G groups of e = E/G experts, P groups per token.
"""

import torch
from torch import Tensor

from manyhands.config import RouterConfig
from manyhands.moe.routing import Routing, top_k_stable
from manyhands.parallel.ranks import ALONE, Ranks, total


def choose_groups(
    logits_TG: Tensor, noisy_TG: Tensor | None, std_TG: Tensor | None, mask_T: Tensor, config: RouterConfig
) -> Routing:
    """The first level. Weights are its gates, which sum to 1."""
    used_TG = logits_TG if noisy_TG is None else noisy_TG
    ids_TP = top_k_stable(used_TG, config.topk_group)
    gates_TP = used_TG.gather(1, ids_TP).softmax(-1)
    kept_TP = torch.ones_like(ids_TP, dtype=torch.bool)
    scores_TG = logits_TG.softmax(-1)
    return Routing(ids_TP, gates_TP, scores_TG, logits_TG, kept_TP, mask_T, noisy_logits=noisy_TG, noise_std=std_TG)


def choose_within(groups: Routing, used_TE: Tensor, config: RouterConfig) -> tuple[Tensor, Tensor]:
    """Ids and weights [T, K] of the second level, best first; `used_TE` are its logits, with noise if there is any.

    A group's best K/P experts are chosen from its own logits alone; a weight is the product of the two gates, times
    `routed_scaling_factor`.
    """
    (T, P), each = groups.expert_ids.shape, config.num_experts_per_tok // config.topk_group
    size = config.num_experts // config.n_group
    own_TPe = used_TE.view(T, config.n_group, size).gather(1, groups.expert_ids[..., None].expand(-1, -1, size))
    within_TPk = top_k_stable(own_TPe.reshape(T * P, size), each).view(T, P, each)
    gates_TPk = groups.weights[..., None] * own_TPe.gather(2, within_TPk).softmax(-1)
    ids_TK = (groups.expert_ids[..., None] * size + within_TPk).flatten(1)
    by_number_TK = ids_TK.argsort(1)  # so that equal weights go to the lower number
    ids_TK, weights_TK = ids_TK.gather(1, by_number_TK), gates_TPk.flatten(1).gather(1, by_number_TK)
    order_TK = top_k_stable(weights_TK, config.num_experts_per_tok)
    return ids_TK.gather(1, order_TK), weights_TK.gather(1, order_TK) * config.routed_scaling_factor


def joint_scores(groups: Routing, logits_TE: Tensor) -> Tensor:
    """[T, E]: the probability of each expert by both softmaxes, without noise. They sum to 1."""
    T, G = groups.scores.shape
    return (groups.scores[..., None] * logits_TE.view(T, G, -1).softmax(-1)).flatten(1)


def hierarchical_load(routing: Routing, chances_TE: Tensor | None, load_G: Tensor, ranks: Ranks = ALONE) -> Tensor:
    """[E]: Load_H of appendix B, Load_ij = Load^i_j(X_i) · Load^p_i / |X_i|, X_i the tokens that chose group i.

    `chances_TE` is each expert's chance within its group (None: the plain count), `load_G` the first level's load, of
    all `ranks`.
    """
    groups = routing.groups
    assert groups is not None
    G = groups.num_experts
    if chances_TE is None:
        within_Ge = ranks.sum(routing.expert_counts()).float().view(G, -1)
    else:
        visited_TG = torch.zeros_like(groups.scores, dtype=torch.bool).scatter(1, groups.expert_ids, True)
        visited_TG = visited_TG & routing.token_mask[:, None]
        within_Ge = total((chances_TE.view(len(visited_TG), G, -1) * visited_TG[..., None]).sum(0), ranks)
    share_G = load_G / ranks.sum(groups.expert_counts()).clamp(min=1)
    return (within_Ge * share_G[:, None]).flatten()
