"""Which experts a token goes to, where that is more than the K best scores: pure functions of scores and tokens.

T tokens, E experts, K experts per token, G groups. What shares tokens out evenly is in `assign.py`.
"""

import torch
from torch import Tensor

from manyhands.config import RouterConfig
from manyhands.errors import ConfigError
from manyhands.moe.routing import top_k_stable


def limit_to_groups(choice_TE: Tensor, config: RouterConfig) -> Tensor:
    """Scores with every expert outside the `topk_group` best groups at −inf.

    V3 scores a group by the sum of its two best experts, V2 by its best. Zero instead of −inf would let a
    forbidden expert win whenever the allowed ones have negative biased scores.
    """
    T, E = choice_TE.shape
    groups_TGe = choice_TE.view(T, config.n_group, E // config.n_group)
    if config.group_score == "max":
        score_TG = groups_TGe.amax(-1)
    else:
        two_TG2 = groups_TGe.topk(min(2, groups_TGe.shape[-1]), dim=-1).values
        alone_TG2 = (two_TG2 == float("-inf")) & (two_TG2[..., :1] != float("-inf"))  # the other one is off
        score_TG = two_TG2.masked_fill(alone_TG2, 0.0).sum(-1)
    best = top_k_stable(score_TG, config.topk_group)
    allowed_TG = torch.zeros_like(score_TG, dtype=torch.bool).scatter_(1, best, True)
    return groups_TGe.masked_fill(~allowed_TG[..., None], float("-inf")).view(T, E)


def sample_second(ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """GShard: the second expert is used with probability min(1, 2·weight), else its id becomes -1.

    The first expert's weight stays as it was renormalised: nothing is redistributed.
    """
    used = 2.0 * weights_TK[:, 1].detach() > torch.rand_like(weights_TK[:, 1])
    return torch.stack((ids_TK[:, 0], torch.where(used, ids_TK[:, 1], -1)), dim=1)


def expert_choice(scores_TE: Tensor, token_mask_T: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Each expert takes its T·k/E best tokens (arXiv 2202.09368). Not causal: a token competes with later ones.

    Returns ids [T, E] (e where expert e took token t, else -1) and the same as kept [T, E].
    """
    E = scores_TE.shape[1]
    real = int(token_mask_T.sum())
    per_expert = min(real, max(1, real * k // E)) if real else 0
    masked_ET = scores_TE.detach().masked_fill(~token_mask_T[:, None], float("-inf")).t().contiguous()
    taken_EC = top_k_stable(masked_ET, per_expert)
    kept_ET = torch.zeros_like(masked_ET, dtype=torch.bool).scatter_(1, taken_EC, True)
    kept_TE = kept_ET.t().contiguous()
    return torch.where(kept_TE, torch.arange(E, device=scores_TE.device), -1), kept_TE


def hash_experts(token_ids_T: Tensor | None, num_experts: int) -> Tensor:
    """[T, 1]: a fixed pseudo-random expert per token id (arXiv 2106.04426). Nothing is learned.

    A multiplicative hash (Knuth), so that neighbouring ids, which a BPE orders by frequency, are spread.
    """
    if token_ids_T is None:
        raise ConfigError("select = 'hash' routes by token id: pass token_ids to the layer")
    return ((token_ids_T * 2654435761 % (1 << 32)) * num_experts >> 32)[:, None]


def positive(scores_TE: Tensor) -> tuple[Tensor, Tensor]:
    """ReMoE (arXiv 2412.14711): every expert whose score is above 0, however many a token has.

    Returns ids [T, E], best first, then -1, and their scores [T, E].
    """
    order_TE = top_k_stable(scores_TE, scores_TE.shape[1])
    sorted_TE = scores_TE.gather(1, order_TE)
    return order_TE.where(sorted_TE > 0, -1), sorted_TE
