"""The oracle's routing, float64, written from the papers and apart from `manyhands/moe`.

Nothing is shared with the router under test but its configuration and weights. Choices are whole-row stable sorts,
capacity is a queue served by a Python loop, and the result is a dense gate matrix.

T tokens, K experts per token, E experts, G groups.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from manyhands.check.oracle_dense import NEVER, DenseRouting, RouterWeights, best, weigh
from manyhands.check.oracle_hierarchy import first_level, two_levels
from manyhands.check.oracle_select import every_positive, logits_slack, shared_out, two_sampled
from manyhands.check.verdict import Slack, judge_choice, judge_kept, one_hot
from manyhands.config import RouterConfig
from manyhands.moe import Routing


def route(
    x_TD: Tensor,
    weights: RouterWeights,
    config: RouterConfig,
    *,
    training: bool,
    mask_T: Tensor,
    ids_T: Tensor,
    generator: torch.Generator,
    tested: Routing,
    slack: float,
    sequence_length: int | None = None,
) -> DenseRouting:
    """Route in float64. Random draws come from `generator` in the pipeline's order: jitter, noise, second expert.

    `tested` is what the router under test did; its choice is taken where ours was decided by rounding alone
    (`verdict.py`), so that everything after it stays comparable. `slack` bounds what counts as rounding.
    """
    if training and config.jitter:
        low, high = 1.0 - config.jitter, 1.0 + config.jitter
        x_TD = x_TD * torch.empty(x_TD.shape, dtype=torch.float32).uniform_(low, high, generator=generator).double()
    logits = x_TD @ weights.weight.T
    logits = logits if weights.logit_bias is None else logits + weights.logit_bias
    first = first_level(x_TD, weights, config, training, generator) if config.select == "hierarchical" else None
    noisy, std = None, None
    if weights.noise_weight is not None and training:
        std = torch.log1p((x_TD @ weights.noise_weight.T).exp()) + 1e-2
        noisy = logits + torch.randn(logits.shape, dtype=torch.float32, generator=generator).double() * std
    scores = _score(logits, config)
    used = scores if noisy is None else _score(noisy, config)
    theirs = tested.scores if tested.noisy_logits is None else _score(tested.noisy_logits.double(), config)
    rounding = Slack.between(used, theirs.double(), slack, weights.bias)
    of_logits = logits_slack(logits, tested.logits, slack, weights.bias)
    none = torch.zeros_like(scores, dtype=torch.bool)
    blank = DenseRouting(logits, scores, none, none, scores, mask_T, tested.scores.double(), noisy, std, router=weights)

    if config.select == "hash":
        table = [[(int(i) * 2654435761 % 2**32) * config.num_experts // 2**32] for i in ids_T]
        chosen = one_hot(torch.tensor(table).view(-1, 1), config.num_experts)
        verdict = judge_choice(chosen, chosen.double(), tested.expert_ids, lambda c: chosen, Slack.none(chosen))
        weights_TE = chosen * config.routed_scaling_factor
        routing = replace(blank, chosen=chosen, kept=chosen, weights=weights_TE.double(), wrong=verdict.wrong)
    elif config.select == "expert_choice":
        routing = _expert_choice(blank, config, tested, rounding)
    elif first is not None:
        routing = two_levels(blank, first, config, tested, slack)
    elif config.select == "positive":
        routing = every_positive(blank, config, tested, of_logits)
    elif config.select == "sparsemixer":
        routing = two_sampled(blank, config, training, generator, tested, of_logits)
    elif config.select in ("base", "sinkhorn") and training:
        routing = shared_out(blank, config, tested, of_logits)
    else:
        near = of_logits if config.bias_on == "logit" else rounding
        routing = _top_k(blank, used, weights.bias, config, training, generator, tested, near)

    factor = config.capacity_factor if training else config.eval_capacity_factor
    if factor is None and config.capacity_tokens is None:
        return routing
    return _with_capacity(routing, config, factor, sequence_length, tested, rounding)


def _softmax(logits: Tensor) -> Tensor:
    powers = (logits - logits.amax(-1, keepdim=True)).exp()
    return powers / powers.sum(-1, keepdim=True)


SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": _softmax,
    "sigmoid": lambda logits: 1.0 / (1.0 + (-logits).exp()),
    "sqrtsoftplus": lambda logits: (logits.clamp(min=0.0) + torch.log1p((-logits.abs()).exp())) ** 0.5,
    "relu": lambda logits: logits * (logits > 0),
}
"""Every `RouterConfig.score`, once more."""


def _score(logits: Tensor, config: RouterConfig) -> Tensor:
    return SCORES[config.score](logits)


def within_groups(choice: Tensor, config: RouterConfig) -> Tensor:
    """Everything outside the best groups at −inf."""
    size = config.num_experts // config.n_group
    totals = []
    for g in range(config.n_group):
        members = choice[:, g * size : (g + 1) * size].sort(dim=-1, descending=True).values
        totals.append(members[:, :1].sum(1) if config.group_score == "max" else members[:, :2].sum(1))
    groups = best(torch.stack(totals, 1), config.topk_group)
    group_of_E = torch.arange(config.num_experts) // size
    allowed = (group_of_E[None, :, None] == groups[:, None, :]).any(-1)
    return torch.where(allowed, choice, NEVER)


def _top_k(
    blank: DenseRouting,
    used: Tensor,
    bias: Tensor | None,
    config: RouterConfig,
    training: bool,
    generator: torch.Generator,
    tested: Routing,
    rounding: Slack,
) -> DenseRouting:
    K, E = config.num_experts_per_tok, config.num_experts

    def select(choice: Tensor) -> Tensor:
        return one_hot(best(within_groups(choice, config) if config.n_group > 1 else choice, K), E)

    basis = blank.logits if config.bias_on == "logit" else used
    choice = basis.detach() if bias is None else basis.detach() + bias
    own = select(choice)
    theirs = tested.expert_ids
    if config.random_second and training:  # an unsampled second is -1 and does not say who it was
        second = best(torch.where(one_hot(theirs[:, :1], E), NEVER, choice), 1)
        theirs = torch.where(theirs < 0, second, theirs)
    verdict = judge_choice(own, choice, theirs, select, rounding)
    chosen, flips, wrong = verdict.chosen, verdict.flips, verdict.wrong

    weights = weigh(chosen, used, config)
    if config.random_second and training:
        draw = torch.rand(len(used), generator=generator).double()
        lesser = chosen & ~one_hot(best(torch.where(chosen, choice, NEVER), 1), E)
        margin = 2.0 * (weights.detach() * lesser).sum(1) / config.routed_scaling_factor - draw
        sampled = margin > 0
        theirs_sampled = tested.expert_ids[:, 1] >= 0
        near = margin.abs() <= 4.0 * rounding.per_token + 1e-6
        flips += int((near & (sampled != theirs_sampled)).sum())
        wrong += int((~near & (sampled != theirs_sampled)).sum())
        sampled = torch.where(near, theirs_sampled, sampled)
        chosen = chosen & ~(lesser & ~sampled[:, None])
        weights = weights * chosen
    return replace(blank, chosen=chosen, kept=chosen, weights=weights, flips=flips, wrong=wrong)


def _expert_choice(blank: DenseRouting, config: RouterConfig, tested: Routing, rounding: Slack) -> DenseRouting:
    """Experts are the rows here: each takes its real·k/E best real tokens."""
    E, T = config.num_experts, len(blank.mask)
    real = int(blank.mask.sum())
    each = min(real, max(1, real * config.num_experts_per_tok // E))
    choice = torch.where(blank.mask[:, None], blank.scores.detach(), NEVER).T

    def select(choice: Tensor) -> Tensor:
        return one_hot(best(choice, each), T)

    theirs = (tested.expert_ids >= 0).T
    verdict = judge_choice(select(choice), choice, theirs, select, rounding.widest(E))
    chosen = verdict.chosen.T
    weights = torch.where(chosen, blank.scores, 0.0) * config.routed_scaling_factor
    return replace(blank, chosen=chosen, kept=chosen, weights=weights, flips=verdict.flips, wrong=verdict.wrong)


def _with_capacity(
    routing: DenseRouting,
    config: RouterConfig,
    factor: float | None,
    sequence_length: int | None,
    tested: Routing,
    rounding: Slack,
) -> DenseRouting:
    """Group by group, serve the pairs in turn: all first choices before all second choices, or by weight; padding
    takes no room."""
    T, E, K = len(routing.mask), config.num_experts, config.num_experts_per_tok
    ids = tested.expert_ids  # best first; held against our own order by `judge_choice`
    weights = routing.weights.detach()
    kept = torch.zeros(T, E, dtype=torch.bool)
    size = {"batch": T, "sequence": sequence_length or T, "group": config.capacity_group or T}[config.capacity_per]
    for start in range(0, T, max(1, size)):
        members = [t for t in range(start, min(start + size, T)) if routing.mask[t]]
        room, taken = _room(len(members), config, factor), [0] * E
        queue = [(k, t) for k in range(K) for t in members if ids[t, k] >= 0]
        if config.drop_policy == "probability":
            queue.sort(key=lambda pair: -float(weights[pair[1], ids[pair[1], pair[0]]]))
        for k, t in queue:
            e = int(ids[t, k])
            if routing.chosen[t, e] and taken[e] < room:
                kept[t, e] = True
                taken[e] += 1
    verdict = judge_kept(kept, routing.weights, tested, config.drop_policy == "probability", rounding)
    return replace(
        routing, kept=verdict.chosen, flips=routing.flips + verdict.flips, wrong=routing.wrong + verdict.wrong
    )


def _room(real: int, config: RouterConfig, factor: float | None) -> int:
    """How many tokens an expert takes of a group of `real`."""
    if config.capacity_tokens is not None:
        return config.capacity_tokens
    assert factor is not None
    fair = real * config.num_experts_per_tok / config.num_experts
    return min(real, max(config.min_capacity, math.floor(factor * fair)))
