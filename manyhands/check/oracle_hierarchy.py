"""The oracle's two-level gate, float64, from appendix B of arXiv 1701.06538 and apart from `manyhands/moe`.

T tokens, E experts, G groups of e = E/G experts, P groups per token.
"""

from dataclasses import replace

import torch
from torch import Tensor

from manyhands.check.oracle_dense import NEVER, DenseRouting, RouterWeights, best
from manyhands.check.oracle_select import logits_slack
from manyhands.check.verdict import judge_choice, one_hot
from manyhands.config import RouterConfig
from manyhands.moe import Routing


def first_level(
    x_TD: Tensor, weights: RouterWeights, config: RouterConfig, training: bool, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits [T, G], those with noise, and the noise's deviation; it is drawn before the experts' noise."""
    assert weights.group_weight is not None
    logits = x_TD @ weights.group_weight.T
    if weights.group_noise_weight is None or not training:
        return logits, logits, None
    std = torch.log1p((x_TD @ weights.group_noise_weight.T).exp()) + 1e-2
    return logits, logits + torch.randn(logits.shape, dtype=torch.float32, generator=generator).double() * std, std


def two_levels(
    blank: DenseRouting,
    first: tuple[Tensor, Tensor, Tensor | None],
    config: RouterConfig,
    tested: Routing,
    slack: float,
) -> DenseRouting:
    """Groups by the first level, then in each of them experts by the second; a weight is the product of the gates."""
    G, E, each = config.n_group, config.num_experts, config.num_experts_per_tok // config.topk_group
    assert tested.groups is not None
    group_logits, group_used, group_std = first
    used = blank.logits if blank.noisy_logits is None else blank.noisy_logits
    seen = tested.groups.logits if tested.groups.noisy_logits is None else tested.groups.noisy_logits
    seen_experts = tested.logits if tested.noisy_logits is None else tested.noisy_logits

    near = logits_slack(group_used, seen, slack)
    own = one_hot(best(group_used, config.topk_group), G)
    verdict = judge_choice(
        own, group_used, tested.groups.expert_ids, lambda c: one_hot(best(c, config.topk_group), G), near
    )
    groups, flips, wrong = verdict.chosen, verdict.flips, verdict.wrong
    gate_TG = _gates(group_used, groups)
    theirs_TE = one_hot(tested.expert_ids, E)
    chosen, weights = [], []
    for g, members in enumerate(torch.arange(E).view(G, -1)):
        logits = used[:, members]
        own = one_hot(best(logits, each), len(members))
        theirs = torch.where(groups[:, g, None], theirs_TE[:, members], own)  # who is elsewhere chooses nobody here
        near = logits_slack(logits, seen_experts[:, members], slack)
        verdict = judge_choice(own, logits, theirs, lambda c: one_hot(best(c, each), c.shape[1]), near)
        flips, wrong = flips + verdict.flips, wrong + verdict.wrong
        chosen.append(verdict.chosen & groups[:, g, None])
        weights.append(gate_TG[:, g, None] * _gates(logits, verdict.chosen))
    chosen_TE = torch.cat(chosen, 1)
    wrong += int((theirs_TE & ~groups.repeat_interleave(E // G, 1)).any(1).sum())  # an expert of no group of its token
    p_TG = _gates(group_logits, torch.ones_like(groups))
    p_TE = torch.cat([p_TG[:, [g]] * _gates(part, part == part) for g, part in enumerate(blank.logits.chunk(G, 1))], 1)
    above = replace(
        blank,
        logits=group_logits,
        scores=p_TG,
        chosen=groups,
        kept=groups,
        weights=gate_TG,
        tested_scores=tested.groups.scores.double(),
        noisy_logits=None if group_std is None else group_used,
        noise_std=group_std,
    )
    return replace(
        blank,
        scores=p_TE,
        chosen=chosen_TE,
        kept=chosen_TE,
        weights=torch.cat(weights, 1) * config.routed_scaling_factor,
        flips=flips,
        wrong=wrong,
        groups=above,
    )


def _gates(logits: Tensor, chosen: Tensor) -> Tensor:
    """Softmax over what was chosen, 0 elsewhere."""
    powers = torch.where(chosen, (logits - torch.where(chosen, logits, NEVER).amax(1, keepdim=True)).exp(), 0.0)
    return powers / powers.sum(1, keepdim=True)
