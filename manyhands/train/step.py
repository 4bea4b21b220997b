"""One optimiser step, on one screen: what is learnt is the task's, what is added up is summed over ranks.

L sparse layers, E experts, H heads.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manyhands.config import RunConfig
from manyhands.errors import DataError, TrainingHalted
from manyhands.models import AnyModel, Decoder
from manyhands.moe import LoadCounter, Routing, balance_objective
from manyhands.moe.control import Control
from manyhands.moe.load import summed
from manyhands.parallel.ranks import Alone, Ranks, largest_of, sum_of
from manyhands.parallel.shards import local
from manyhands.train.gradients import clip_gradients, grad_norm, sum_gradients
from manyhands.train.guard import SpikeGuard, first_non_finite
from manyhands.train.optim import Optimizers
from manyhands.train.qk_clip import clips, qk_clip_
from manyhands.train.task import Count, Forward, LanguageModelling, Task


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step measured, over all micro-batches and ranks."""

    loss: float
    """The task's, mean over all targets: nats per token for a language model."""
    terms: dict[str, float]
    """The balance terms, unweighted, mean over layers."""
    grad_norm: float
    skipped: bool
    """The guard took the step for a spike: no weight was changed."""
    counters: dict[int, LoadCounter]
    """Expert load of this step per sparse layer."""
    count: Count
    """How much was trained on."""


def train_step(
    model: AnyModel,
    optimizers: Optimizers,
    guard: SpikeGuard,
    batch: Any,
    run: RunConfig,
    step: int,
    lr: float,
    dtype: torch.dtype,
    task: Task | None = None,
    ranks: Ranks | None = None,
    seen: Callable[[Any, Mapping[int, Routing]], None] | None = None,
) -> StepResult:
    """Train on this rank's `batch` of `task` (None: language modelling) and update the weights once.

    `seen` is given each micro-batch and its routing, once it has run.

    Raises `TrainingHalted`, with every weight as it was, if the loss or a gradient is not finite; `DataError` if there
    is no target in the whole batch.
    """
    learnt: Task = LanguageModelling() if task is None else task
    ranks = ranks or Alone()
    optimizers.zero_grad()
    moe, device = model.config.moe, model.embed_tokens.weight.device
    layers = model.sparse_layers()
    num_experts = 0 if moe is None else moe.router.num_experts
    counters = {layer: LoadCounter.empty(num_experts, device) for layer in model.config.sparse_layers}
    clip_above = run.optim.qk_clip if run.optim.name == "muon" and clips(model.config) else None
    control, routers = Control(layers, run.balance), {n: layer.router for n, layer in layers.items()}
    keep_outputs = run.balance.orthogonality_coef > 0 or control.wants_outputs
    how = Forward(dtype, run.train.recompute, clip_above, keep_outputs=keep_outputs)
    largest: dict[int, Tensor] = {}
    loss_sum, terms_sum = 0.0, dict[str, float]()

    micros = learnt.split(batch, run.train.micro_batch_size)
    whole = _total(map(learnt.count, micros), ranks)
    if not whole.targets:
        raise DataError(f"step {step}: none of its {whole.tokens} tokens is a target: there is nothing to learn from")
    for micro in micros:
        count = learnt.count(micro)
        loss = learnt.loss(model, micro, how)
        if seen is not None:
            seen(micro, loss.routings)
        of_targets, of_sequences = count.targets / whole.targets, count.sequences / whole.sequences
        for layer, routing in loss.routings.items():  # once per forward, outside anything that recomputes
            counters[layer].add(routing)
            control.observe(layer, routing, of_sequences)
        step_counts = _counts(counters, ranks)
        balance, terms = balance_objective(loss.routings, run.balance, count.sequences, step_counts, routers, ranks)
        (loss.mean * of_targets + balance * of_sequences).backward()  # type: ignore[no-untyped-call]
        loss_sum += float(loss.mean.detach()) * of_targets
        for name, value in terms.items():
            terms_sum[name] = terms_sum.get(name, 0.0) + float(value) * of_sequences
        for layer, largest_H in loss.max_logits.items():
            largest[layer] = torch.maximum(largest[layer], largest_H) if layer in largest else largest_H

    counters = summed(counters, ranks)
    loss_sum, *sums = sum_of([loss_sum, *terms_sum.values()], ranks)
    terms_sum = dict(zip(terms_sum, sums, strict=True))
    sum_gradients(model.parameters(), ranks)
    # Looked at before it scales anything: a NaN would hide where it came from.
    norm = grad_norm(model.parameters(), ranks)
    objective = loss_sum + sum(terms_sum.values()) + float(norm)
    if any(largest_of([not abs(objective) < float("inf")], ranks)):  # true for NaN as well
        raise TrainingHalted(f"step {step}: {_culprit(model, loss_sum, ranks)} is not finite; no weight was changed")
    skipped = guard.observe(loss_sum, float(norm))
    if not skipped:
        if run.optim.grad_clip is not None:
            clip_gradients(model.parameters(), run.optim.grad_clip, norm)
        optimizers.set_lr(lr)
        optimizers.step()
        control.step(counters, ranks)
        for layer, largest_H in largest.items():
            assert clip_above is not None and isinstance(model, Decoder)
            attention = model.get_submodule(f"layers.{layer}.self_attn")
            qk_clip_(attention, ranks.max(largest_H), clip_above, model.config.attention)
    return StepResult(loss_sum, terms_sum, float(norm), skipped, counters, whole)


def _total(counts: Iterable[Count], ranks: Ranks) -> Count:
    """Of all micro-batches and ranks."""
    columns = zip(*((count.sequences, count.tokens, count.targets) for count in counts), strict=True)
    return Count(*map(int, sum_of([float(sum(column)) for column in columns], ranks)))


def _counts(counters: Mapping[int, LoadCounter], ranks: Ranks) -> dict[int, Tensor]:
    """The pairs of every expert in the step so far, of all ranks, per layer."""
    if not counters:
        return {}
    return dict(zip(counters, ranks.sum(torch.stack([counter.counts for counter in counters.values()])), strict=True))


def _culprit(model: AnyModel, loss: float, ranks: Ranks) -> str:
    """The first weight, then the loss, then the first gradient that is NaN or Inf on any rank."""
    named = list(model.named_parameters())
    if weight := _first(((name, p) for name, p in named), ranks):
        return f"weight {weight}"
    if not abs(loss) < float("inf"):
        return "the loss"
    gradient = _first(((name, p.grad) for name, p in named), ranks)
    return f"the gradient of {gradient}" if gradient else "a balance term"


def _first(named: Iterable[tuple[str, Tensor | None]], ranks: Ranks) -> str | None:
    """The first that is not finite on any rank: each looks at what lies with it."""
    tensors = [(name, None if t is None else local(t.detach())) for name, t in named]
    names = [name for name, _ in tensors]
    own = first_non_finite(tensors)
    [after] = largest_of([0.0 if own is None else len(names) - names.index(own)], ranks)
    return names[len(names) - int(after)] if after else None
