"""Balance: what keeps the router from sending everything to a few experts.

Losses are plain functions of one layer's `Routing`; the caller averages them over layers. The loss-free bias is a
controller that steps once per optimiser step.

A micro-batch may be spread over `ranks`: every sum over tokens is one over all of them, so that each rank gets the loss
of the whole; weighted by shares that add up to 1, so do the gradients.

One scale for f·P: L = E·Σ_i f_i·P_i, with f_i the share of pairs (sums to 1, no gradient) and P_i the mean normalised
score (sums to 1). L is 1 at perfect balance for any K, and may fall below 1. Other frameworks' losses are this times:
Switch, Mesh-TF 1; DeepSeek-V3, Megatron 1; GShard Alg. 1 1/E²; Hugging Face Mixtral K.

T tokens, K experts per token, E experts, D model width.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from manyhands.errors import ConfigError
from manyhands.moe.hierarchy import hierarchical_load
from manyhands.moe.routing import Routing, count_experts, top_k_stable
from manyhands.parallel.ranks import ALONE, Ranks, total

L1_RATIO = 1.2  # ReMoE, section 3.4: the penalty is found by steps of a fifth


def pool_layers(routings: Iterable[Routing]) -> Routing:
    """Several layers' routings as one of L·T tokens: for losses that average over layers before they multiply.

    transformers' `load_balancing_loss_func` does; a layer's imbalance can hide in the mean. Here it is for comparison.
    """
    return Routing.cat(list(routings))


def masked_mean(values_T: Tensor, mask_T: Tensor, ranks: Ranks = ALONE) -> Tensor:
    """Mean over the tokens whose mask is true; 0 when there are none."""
    return _over((values_T * mask_T).sum(), mask_T, ranks)


def _over(sums: Tensor, mask_T: Tensor, ranks: Ranks) -> Tensor:
    """`sums`, added up over ranks, over the number of tokens whose mask is true on any; both in one exchange."""
    count = mask_T.sum()
    if ranks.size == 1:
        return sums / count.clamp(min=1)
    both = total(torch.cat((sums.flatten().double(), count[None].double())), ranks)
    return (both[:-1].view_as(sums) / both[-1].clamp(min=1.0)).to(sums.dtype)


def cv_squared(values_E: Tensor) -> Tensor:
    """Squared coefficient of variation, population variance / mean². Smooth at perfect balance (no square root)."""
    return values_E.var(correction=0) / (values_E.mean() ** 2 + 1e-10)


def gates(routing: Routing) -> Tensor:
    """[T, E]: each token's combination weights at the experts it chose, 0 elsewhere; 0 for padding."""
    chosen = (routing.expert_ids >= 0) & routing.token_mask[:, None]
    dense = torch.zeros_like(routing.scores)
    return dense.scatter_add(1, routing.expert_ids.clamp(min=0), routing.weights * chosen)


def importance_loss(routing: Routing, ranks: Ranks = ALONE) -> Tensor:
    """CV² of Σ_t G_te, Shazeer et al. 2017 (arXiv 1701.06538), equation 7."""
    return cv_squared(total(gates(routing).sum(0), ranks))


def smooth_load(routing: Routing, ranks: Ranks = ALONE) -> Tensor:
    """[E]: expected number of tokens per expert if each expert's own noise were drawn again (Shazeer, appendix A).

    P(x, i) = Φ((logit_i − threshold_i) / σ_i), the threshold being the k-th highest noisy logit among the others.
    Without noise (evaluation), or with K = E where there is no (K+1)-th value, it is the plain count. That of a
    hierarchical gate is appendix B's.
    """
    K, logits, noisy, std = routing.expert_ids.shape[1], routing.logits, routing.noisy_logits, routing.noise_std
    if routing.groups is not None:
        (T, P), G = routing.groups.expert_ids.shape, routing.groups.num_experts
        noisy, std = (None if t is None else t.view(T, G, -1) for t in (noisy, std))
        chances = _chances(logits.view(T, G, -1), noisy, std, K // P)
        return hierarchical_load(routing, chances, smooth_load(routing.groups, ranks), ranks)
    chances = _chances(logits, noisy, std, K)
    if chances is None:
        return ranks.sum(routing.expert_counts()).float()
    return total((chances * routing.token_mask[:, None]).sum(0), ranks)


def _chances(logits: Tensor, noisy: Tensor | None, std: Tensor | None, k: int) -> Tensor | None:
    """[..., E]: the probability that each would be among the k highest if its own noise were drawn again."""
    if noisy is None or std is None or k == logits.shape[-1]:
        return None
    top = noisy.topk(k + 1, dim=-1).values
    threshold_in, threshold_out = top[..., k, None], top[..., k - 1, None]
    threshold = torch.where(noisy > threshold_in, threshold_in, threshold_out)
    chances: Tensor = torch.special.ndtr((logits - threshold) / std)
    return chances


def load_loss(routing: Routing, ranks: Ranks = ALONE) -> Tensor:
    """CV² of the smooth load, Shazeer et al. 2017."""
    return cv_squared(smooth_load(routing, ranks))


def mean_probability(routing: Routing, ranks: Ranks = ALONE) -> Tensor:
    """P [E]: mean over real tokens of the scores, normalised to sum to 1 per token."""
    mask_T = routing.token_mask
    return _over((_normalised(routing.scores) * mask_T[:, None]).sum(0), mask_T, ranks)


def load_balancing_loss(routing: Routing, counts_E: Tensor | None = None, ranks: Ranks = ALONE) -> Tensor:
    """f·P over this micro-batch, or with f from `counts_E` [E] int: the pairs of a larger scope.

    For the global-batch loss (arXiv 2501.11873) pass the counts of the optimiser step so far, summed over
    ranks and micro-batches; P stays the micro-batch's.
    """
    counts_E = ranks.sum(routing.expert_counts()) if counts_E is None else counts_E
    f_E = counts_E.float() / counts_E.sum().clamp(min=1)
    return routing.num_experts * (f_E * mean_probability(routing, ranks)).sum()


def sequence_balancing_loss(routing: Routing, num_sequences: int, ranks: Ranks = ALONE) -> Tensor:
    """f·P within each sequence, averaged over the sequences that have a real token. Rows must be [B·S]."""
    return _per_sequence(routing, routing.expert_ids, num_sequences, ranks)


def complementary_sequence_loss(routing: Routing, num_sequences: int, ranks: Ranks = ALONE) -> Tensor:
    """DeepSeek-V3's sequence-wise loss (arXiv 2412.19437, equations 17–20): f from the top-k of the unbiased scores."""
    k = routing.expert_ids.shape[1]
    return _per_sequence(routing, top_k_stable(routing.scores, k), num_sequences, ranks)


def _per_sequence(routing: Routing, ids_TK: Tensor, num_sequences: int, ranks: Ranks) -> Tensor:
    B, E = num_sequences, routing.num_experts
    T = routing.token_mask.shape[0]
    mask_BS = routing.token_mask.view(B, T // B)
    sequence_T = torch.arange(T, device=ids_TK.device) // (T // B)
    cells = torch.where(ids_TK >= 0, ids_TK + E * sequence_T[:, None], -1)  # one counter per (sequence, expert)
    counts_BE = count_experts(cells, routing.token_mask, B * E).view(B, E)
    f_BE = counts_BE.float() / counts_BE.sum(1, keepdim=True).clamp(min=1)
    p_BSE = _normalised(routing.scores).view(B, T // B, E) * mask_BS[..., None]
    p_BE = p_BSE.sum(1) / mask_BS.sum(1, keepdim=True).clamp(min=1)
    return masked_mean(E * (f_BE * p_BE).sum(1), mask_BS.any(1), ranks)


def z_loss(routing: Routing, ranks: Ranks = ALONE) -> Tensor:
    """mean_t logsumexp(logits_t)², ST-MoE (arXiv 2202.08906): keeps the logits small, does not balance."""
    return masked_mean(routing.logits.logsumexp(-1) ** 2, routing.token_mask, ranks)


def variance_loss(routing: Routing, ranks: Ranks = ALONE) -> Tensor:
    """−Σ_t Σ_e (s_te − s̄_e)²/E per token: rewards routing that differs between tokens (arXiv 2505.22323)."""
    scores_TE, mask_T = routing.scores, routing.token_mask
    mean_E = _over((scores_TE * mask_T[:, None]).sum(0), mask_T, ranks)
    return -masked_mean(((scores_TE - mean_E) ** 2).mean(1), mask_T, ranks)


def orthogonality_loss(routing: Routing, ranks: Ranks = ALONE) -> Tensor:
    """Σ_j Σ_{k≠j} ‖projection of o_j on o_k‖² per token, o the chosen experts' outputs (arXiv 2505.22323).

    Rewards experts that say different things. Needs `routing.expert_outputs`; dropped pairs do not count.
    """
    assert routing.expert_outputs is not None, "call the layer with keep_outputs=True"
    o_TKD = routing.expert_outputs.float()
    dot_TKK = torch.bmm(o_TKD, o_TKD.transpose(1, 2))
    norm_TK = dot_TKK.diagonal(dim1=1, dim2=2)
    projection_TKK = dot_TKK**2 / (norm_TK[:, None, :] + 1e-6)
    off_diagonal = ~torch.eye(o_TKD.shape[1], dtype=torch.bool, device=o_TKD.device)
    both_TKK = routing.kept[:, :, None] & routing.kept[:, None, :] & off_diagonal
    return masked_mean((projection_TKK * both_TKK).sum((1, 2)), routing.token_mask, ranks)


def l1_loss(routing: Routing, k: int, ranks: Ranks = ALONE) -> Tensor:
    """ReMoE (arXiv 2412.14711, section 3.4): Σ_e f_e · mean_t score_te, f_e the tokens of e over its fair share T·k/E.

    At even load it is the mean of a token's summed scores, the L1 norm of its gates; busy experts pay more.
    """
    mask_T = routing.token_mask
    fair = ranks.sum(mask_T.sum()).clamp(min=1) * (k / routing.num_experts)
    return masked_mean((routing.scores * (ranks.sum(routing.expert_counts()) / fair)).sum(1), mask_T, ranks)


def l1_factor(steps: Tensor) -> Tensor:
    """What the penalty's coefficient has become of λ₀: 1.2 to the power of the steps up less those down."""
    return L1_RATIO**steps


def update_l1_(steps: Iterable[Tensor], pairs: int, tokens: int, k: int) -> None:
    """ReMoE's controller: one step up where tokens had more than k experts on average, over all layers, or down.

    `pairs` and `tokens` are those of all layers in the optimiser step. In place; every layer's is the same.
    """
    sign = (pairs > tokens * k) - (pairs < tokens * k)
    for steps_ in steps:
        steps_ += sign


def simbal_loss(weight_ED: Tensor) -> Tensor:
    """SimBal (arXiv 2506.14038): ‖W·Wᵀ − I‖₁, the sum of absolute values. 0 where the experts' rows are orthonormal.

    Tokens alike are then routed alike: an orthogonal router keeps their angles. It promises no balance.
    """
    identity_EE = torch.eye(len(weight_ED), dtype=weight_ED.dtype, device=weight_ED.device)
    return (weight_ED @ weight_ED.T - identity_EE).abs().sum()


def _normalised(scores_TE: Tensor) -> Tensor:
    """Scores that sum to 1 per token: softmax already does, sigmoid is divided by its sum."""
    return scores_TE / (scores_TE.sum(-1, keepdim=True) + 1e-20)


@torch.no_grad()
def quantile_bias(choice_TE: Tensor, bias_E: Tensor, token_mask_T: Tensor, k: int) -> Tensor:
    """[E]: the bias with which each expert would have had its share of these tokens (quantile balancing, Megatron).

    With β = −bias: α_t is the (k+1)-th best of a token's choice − β, its price of entry; β_e becomes the (q+1)-th
    largest of choice_te − α_t, q = ⌊T·k/E⌋, so that q tokens are willing to pay more. The bias stays where every token
    goes to every expert, or without tokens. `choice_TE` is what experts are chosen by, without bias.
    """
    choice_TE = choice_TE[token_mask_T]
    T, E = choice_TE.shape
    if not T or k == E:
        return bias_E.clone()
    price_T1 = (choice_TE + bias_E).topk(k + 1, dim=1).values[:, -1:]
    return -(choice_TE - price_T1).topk(T * k // E + 1, dim=0).values[-1]


@torch.no_grad()
def update_bias(bias_E: Tensor, counts_E: Tensor, rate: float) -> None:
    """The loss-free controller (arXiv 2408.15664): b += γ·sign(mean(c) − c), with the mean of the signs removed.

    Call once per optimiser step with the counts of the whole step, summed over micro-batches and ranks. Centring
    (Moonlight, torchtitan) changes no choice and keeps b from drifting. In place, float32.

    Raises `ConfigError` for counts of another number of experts, and a rate that is negative or no number.
    """
    if counts_E.shape != bias_E.shape:
        raise ConfigError(f"counts of {list(counts_E.shape)} experts for a bias of {list(bias_E.shape)}")
    if not rate >= 0:
        raise ConfigError(f"the rate of the bias is {rate}; a number from 0 on is right")
    counts = counts_E.double()
    sign_E = torch.sign(counts.mean() - counts).float()
    bias_E += rate * (sign_E - sign_E.mean())
