"""The oracle's balance losses and bias controller, float64, from `DenseRouting`. Written apart from `moe/balance.py`.

Σ are over real tokens only. T tokens, E experts, B sequences.
"""

from dataclasses import replace

import torch
from torch import Tensor

from manyhands.check.oracle_dense import DenseRouting, best
from manyhands.check.verdict import one_hot
from manyhands.config import BalanceConfig, RouterConfig


def terms(
    r: DenseRouting, router: RouterConfig, config: BalanceConfig, num_sequences: int, step_counts_E: Tensor
) -> dict[str, Tensor]:
    """One layer's terms that have a coefficient, unweighted. `step_counts_E` is for the global scope."""
    found: dict[str, Tensor] = {}
    if config.aux_loss_coef:
        if config.aux_scope == "sequence":
            found["aux_loss"] = per_sequence(r, r.chosen, num_sequences)
        else:
            counts = step_counts_E if config.aux_scope == "global" else r.counts()
            found["aux_loss"] = f_times_p(r, counts, r.mask)
    if config.z_loss_coef:
        found["z_loss"] = _mean(r.logits.exp().sum(1).log() ** 2, r.mask)
    if config.importance_coef:
        found["importance"] = cv_squared((r.weights * r.mask[:, None]).sum(0))
    if config.load_coef:
        load = smooth_load(r, router.num_experts_per_tok) if r.groups is None else two_level_load(r, router)
        found["load"] = cv_squared(load)
    if config.sequence_loss_coef:
        unbiased = one_hot(best(r.tested_scores, router.num_experts_per_tok), router.num_experts)
        found["sequence_loss"] = per_sequence(r, unbiased, num_sequences)
    if config.orthogonality_coef:
        found["orthogonality"] = orthogonality(r)
    if config.variance_coef:
        found["variance"] = -_mean(((r.scores - _mean(r.scores, r.mask)) ** 2).mean(1), r.mask)
    assert r.router is not None
    if config.simbal_coef:
        gram = torch.einsum("ed,fd->ef", r.router.weight, r.router.weight)
        apart = [gram[e, f] - float(e == f) for e in range(len(gram)) for f in range(len(gram))]
        found["simbal"] = torch.stack(apart).abs().sum()
    if config.l1_coef and r.router.l1_steps is not None:
        fair = int(r.mask.sum()) * router.num_experts_per_tok / router.num_experts
        busy = r.counts().double() / max(fair, 1e-9)
        found["l1"] = 1.2 ** float(r.router.l1_steps) * (busy * _mean(r.scores, r.mask)).sum()
    return found


def _mean(values: Tensor, mask_T: Tensor) -> Tensor:
    """Mean over the real tokens of [T] or [T, E]; 0 without any."""
    real = values[mask_T]
    return real.mean(0) if len(real) else values.sum(0) * 0.0


def cv_squared(values_E: Tensor) -> Tensor:
    """Population variance over squared mean, with Shazeer's 1e-10."""
    mean = values_E.sum() / len(values_E)
    return ((values_E - mean) ** 2).sum() / len(values_E) / (mean**2 + 1e-10)


def f_times_p(r: DenseRouting, counts_E: Tensor, mask_T: Tensor) -> Tensor:
    """E·Σ f·P over the tokens of `mask_T`: f the share of the pairs, P the mean score, scores summing to 1."""
    f = counts_E.double() / max(int(counts_E.sum()), 1)
    p = _mean(r.scores / (r.scores.sum(1, keepdim=True) + 1e-20), mask_T)
    return len(f) * (f * p).sum()


def per_sequence(r: DenseRouting, chosen: Tensor, num_sequences: int) -> Tensor:
    """f·P in each sequence by itself, then the mean over sequences with a real token."""
    length = len(r.mask) // num_sequences
    losses = []
    for b in range(num_sequences):
        here = torch.zeros_like(r.mask)
        here[b * length : (b + 1) * length] = r.mask[b * length : (b + 1) * length]
        if here.any():
            losses.append(f_times_p(r, chosen[here].sum(0), here))
    return torch.stack(losses).mean() if losses else r.scores.sum() * 0.0


def smooth_load(r: DenseRouting, k: int) -> Tensor:
    """[E]: Σ_t P(expert e would be chosen if only its own noise were drawn again), one expert at a time."""
    E = r.scores.shape[1]
    if r.noisy_logits is None or r.noise_std is None or k == E:
        return r.counts().double()
    loads = []
    for e in range(E):
        others = torch.cat((r.noisy_logits[:, :e], r.noisy_logits[:, e + 1 :]), 1)
        threshold = others.sort(dim=1, descending=True).values[:, k - 1]
        z = (r.logits[:, e] - threshold) / r.noise_std[:, e]
        loads.append((0.5 * (1.0 + torch.erf(z / 2**0.5)) * r.mask).sum())
    return torch.stack(loads)


def two_level_load(r: DenseRouting, router: RouterConfig) -> Tensor:
    """[E]: Load^i_j over the tokens of group i, times Load^p_i over their number (appendix B)."""
    assert r.groups is not None
    each, first = router.num_experts_per_tok // router.topk_group, smooth_load(r.groups, router.topk_group)
    loads = []
    for g, members in enumerate(torch.arange(router.num_experts).view(router.n_group, -1)):
        visits = r.mask & r.groups.chosen[:, g]
        within = replace(
            r,
            logits=r.logits[:, members],
            scores=r.scores[:, members],
            chosen=r.chosen[:, members],
            mask=visits,
            noisy_logits=None if r.noisy_logits is None else r.noisy_logits[:, members],
            noise_std=None if r.noise_std is None else r.noise_std[:, members],
        )
        loads.append(smooth_load(within, each) * first[g] / max(int(visits.sum()), 1))
    return torch.cat(loads)


def orthogonality(r: DenseRouting) -> Tensor:
    """Σ over ordered pairs of a token's kept experts of ‖projection of one output on the other‖², mean over tokens."""
    assert r.outputs is not None
    o = r.outputs * r.kept[..., None]
    dot = torch.einsum("tid,tjd->tij", o, o)
    squared_norm = (o**2).sum(-1)
    projection = dot**2 / (squared_norm[:, None, :] + 1e-6)
    return _mean((projection * ~torch.eye(o.shape[1], dtype=torch.bool)).sum((1, 2)), r.mask)


def bias_after_step(bias_E: Tensor, counts_E: Tensor, rate: float) -> Tensor:
    """b + γ·(sign(mean(c) − c) − its mean): one step of the loss-free controller, from exact integers."""
    total, E = int(counts_E.sum()), len(counts_E)
    signs = [(total > E * int(c)) - (total < E * int(c)) for c in counts_E]
    return bias_E.double() + rate * (torch.tensor(signs, dtype=torch.float64) - sum(signs) / E)


def quantile_bias(r: DenseRouting, config: RouterConfig) -> Tensor:
    """[E]: what Megatron's quantile balancing makes of one micro-batch, by whole sorts, token by token."""
    assert r.router is not None and r.router.bias is not None
    choice = (r.logits if config.bias_on == "logit" else r.scores).detach()[r.mask]
    T, E = choice.shape
    k = config.num_experts_per_tok
    if not T or k == E:
        return r.router.bias
    prices = [sorted((row + r.router.bias).tolist(), reverse=True)[k] for row in choice]
    over = choice - torch.tensor(prices, dtype=torch.float64)[:, None]
    return torch.tensor([-sorted(column.tolist(), reverse=True)[T * k // E] for column in over.T], dtype=torch.float64)


def averages_after(before_ED: Tensor, routings: list[DenseRouting], decay: float) -> Tensor:
    """[E, D]: Default MoE's averages after a step of these micro-batches, expert by expert."""
    after = before_ED.detach().clone()
    for e in range(len(after)):
        said = [r.outputs[r.kept[:, e] & r.mask, e].detach() for r in routings if r.outputs is not None]
        if sum(map(len, said)):
            after[e] = decay * after[e] + (1.0 - decay) * torch.cat(said).mean(0)
    return after


def l1_steps_after(steps: float, routings: list[DenseRouting], config: RouterConfig) -> float:
    """ReMoE's coefficient, as a power of 1.2, after a step of these routings of every layer."""
    active = sum(int(r.counts().sum()) for r in routings)
    wanted = sum(int(r.mask.sum()) for r in routings) * config.num_experts_per_tok
    return steps + (active > wanted) - (active < wanted)
