"""The oracle's selections that are not the K best scores: ReMoE, BASE, Sinkhorn, SparseMixer. Float64, from the papers.

T tokens, E experts.
"""

from dataclasses import replace

import torch
from torch import Tensor

from manyhands.check.oracle_assign import even_offsets, judge_assignment
from manyhands.check.oracle_dense import NEVER, DenseRouting, best, weigh
from manyhands.check.verdict import Slack, Verdict, judge_choice, one_hot
from manyhands.config import RouterConfig
from manyhands.moe import Routing

OFFSETS = 2e-3
"""How far Sinkhorn's offsets may differ: a float32 loop may stop one round earlier or later."""


def logits_slack(ours: Tensor, theirs: Tensor, limit: float, bias: Tensor | None = None) -> Slack:
    """`Slack` of logits, which are of any size."""
    size = float(ours.detach().abs().amax()) if ours.numel() else 1.0
    return Slack.between(ours, theirs.double(), limit * max(1.0, size), bias)


def every_positive(blank: DenseRouting, config: RouterConfig, tested: Routing, rounding: Slack) -> DenseRouting:
    """ReMoE: whatever ReLU leaves. Only a logit of nearly 0 may be on the other side."""
    E, near = config.num_experts, blank.logits.detach().abs() <= 2.0 * rounding.per_token[:, None]
    own, theirs = blank.scores > 0, one_hot(tested.expert_ids.clamp(max=E - 1), E)
    fine = (own == theirs) | near
    ids = torch.where(tested.expert_ids < 0, E, tested.expert_ids)
    in_turn = torch.cat((blank.scores.detach(), torch.full_like(blank.scores[:, :1], -1.0)), 1).gather(1, ids)
    ordered = (in_turn[:, :-1] - in_turn[:, 1:] >= -2.0 * rounding.per_token[:, None]).all(1)
    right = fine.all(1) & ordered & (theirs.sum(1) == (tested.expert_ids >= 0).sum(1))
    chosen = torch.where(right[:, None], theirs, own)
    scores = torch.where(chosen, blank.logits, 0.0)  # on the side of 0 that was taken
    flips = int((right & (own != theirs).any(1)).sum())
    return replace(
        blank,
        scores=scores,
        chosen=chosen,
        kept=chosen,
        weights=scores * config.routed_scaling_factor,
        flips=flips,
        wrong=int((~right).sum()),
    )


def shared_out(blank: DenseRouting, config: RouterConfig, tested: Routing, rounding: Slack) -> DenseRouting:
    """BASE and Sinkhorn while training; padding goes to its best experts."""
    E, K, mask, logits = config.num_experts, config.num_experts_per_tok, blank.mask, blank.logits.detach()

    def select(choice: Tensor) -> Tensor:
        return one_hot(best(choice, K), E)

    offsets = even_offsets(logits[mask]) if config.select == "sinkhorn" else torch.zeros(E, dtype=torch.float64)
    choice = logits + offsets
    verdict = judge_choice(select(choice), choice, tested.expert_ids, select, Slack(rounding.per_token + OFFSETS))
    chosen, flips, wrong = verdict.chosen.clone(), verdict.flips, verdict.wrong
    if config.select == "base":
        padding = judge_choice(select(logits), logits, tested.expert_ids, select, rounding)
        real = judge_assignment(logits[mask], tested.expert_ids[mask], Slack(rounding.per_token[mask]))
        chosen[~mask], chosen[mask] = padding.chosen[~mask], real.chosen
        flips, wrong = real.flips, real.wrong + int((padding.chosen != select(logits))[~mask].any(-1).sum())
    weights = weigh(chosen, blank.scores, config)
    return replace(blank, chosen=chosen, kept=chosen, weights=weights, flips=flips, wrong=wrong)


def two_sampled(
    blank: DenseRouting,
    config: RouterConfig,
    training: bool,
    generator: torch.Generator,
    tested: Routing,
    rounding: Slack,
) -> DenseRouting:
    """SparseMixer-v2: twice one expert near the best, sampled while training, the second without the first."""
    z, E, T = blank.logits, config.num_experts, len(blank.mask)
    theirs = tested.logits.double()
    taken = torch.zeros_like(z, dtype=torch.bool)
    weights, flips, wrong = torch.zeros_like(z), 0, 0
    for turn in range(2):
        far, their_far = (_far(x.detach(), taken, config.mixer_epsilon) for x in (z, theirs))
        edge = _far(z.detach(), taken, config.mixer_epsilon, 4.0 * rounding.per_token[:, None]) != _far(
            z.detach(), taken, config.mixer_epsilon, -4.0 * rounding.per_token[:, None]
        )
        near = torch.where(torch.where(edge, their_far, far) | taken, NEVER, z)
        flips += int((edge & (far != their_far)).any(1).sum())
        powers = (near - near.detach().amax(1, keepdim=True)).exp()
        gates = powers / powers.sum(1, keepdim=True)
        choice = near.detach()
        if training:
            choice = choice - torch.empty((T, E), dtype=torch.float32).exponential_(generator=generator).double().log()
        verdict = _one(choice, tested.expert_ids[:, turn : turn + 1], rounding)
        flips, wrong = flips + verdict.flips, wrong + verdict.wrong
        weight = gates * verdict.chosen
        if training:
            draw = torch.rand((T, 1), generator=generator)
            top = near.detach().sort(1, descending=True).values
            close = (top[:, :1] - top[:, 1:2]) <= 2.0 * rounding.per_token[:, None]
            whole = (verdict.chosen & one_hot(best(near.detach(), 1), E)).any(1, keepdim=True) | (draw > 0.75)
            said = tested.weights[:, turn : turn + 1].detach().double() / config.routed_scaling_factor
            their_whole = said > weight.detach().sum(1, keepdim=True) * 2.0 / 3.0
            whole = torch.where(close & (draw <= 0.75), their_whole, whole)
            weight = weight - weight.detach() * torch.where(whole, 0.0, 2.0 / 3.0)
        weights, taken = weights + weight, taken | verdict.chosen
    weights = weights * config.routed_scaling_factor
    return replace(blank, chosen=taken, kept=taken, weights=weights, flips=flips, wrong=wrong)


def _one(choice: Tensor, tested_T1: Tensor, rounding: Slack) -> Verdict:
    def select(values: Tensor) -> Tensor:
        return one_hot(best(values, 1), values.shape[1])

    return judge_choice(select(choice), choice, tested_T1, select, rounding)


def _far(z: Tensor, taken: Tensor, epsilon: float, slack: Tensor | float = 0.0) -> Tensor:
    """[T, E] bool: the logit lies more than 2·epsilon, relatively, below the best that is not taken."""
    top = torch.where(taken, NEVER, z).amax(1, keepdim=True)
    return top - z + slack > 2.0 * epsilon * torch.maximum(z.abs(), top)
