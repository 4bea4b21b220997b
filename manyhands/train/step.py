"""One optimiser step, on one screen.

B sequences, S tokens each, T = B·S, L sparse layers, E experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from manyhands.config import RunConfig
from manyhands.errors import TrainingHalted
from manyhands.layers.cross_entropy import linear_cross_entropy
from manyhands.models import Decoder
from manyhands.moe import LoadCounter, balance_objective
from manyhands.moe.balance import update_bias
from manyhands.train.guard import SpikeGuard, first_non_finite
from manyhands.train.optim import Optimizers, grad_norm
from manyhands.train.qk_clip import qk_clip_


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step measured."""

    loss: float
    """Language-model loss, nats per token, mean over the whole batch."""
    terms: dict[str, float]
    """The balance terms, unweighted, mean over layers."""
    grad_norm: float
    skipped: bool
    """The guard took the step for a spike: no weight was changed."""
    counters: dict[int, LoadCounter]
    """Expert load of this step per sparse layer."""


def train_step(
    model: Decoder,
    optimizers: Optimizers,
    guard: SpikeGuard,
    batch: Tensor,
    run: RunConfig,
    step: int,
    lr: float,
    dtype: torch.dtype,
) -> StepResult:
    """Train on `batch` [B, S + 1] (inputs and targets overlap by one) and update the weights once.

    Raises `TrainingHalted`, with every weight as it was, if the loss or a gradient is not finite.
    """
    optimizers.zero_grad()
    moe = model.config.moe
    num_experts = 0 if moe is None else moe.router.num_experts
    counters = {layer: LoadCounter.empty(num_experts, batch.device) for layer in model.config.sparse_layers}
    use_clip = run.optim.name == "muon" and run.optim.qk_clip is not None and model.config.attention.qk_norm == "none"
    largest: dict[int, Tensor] = {}
    loss_sum, terms_sum = 0.0, dict[str, float]()

    for micro in torch.split(batch, run.train.micro_batch_size or len(batch)):
        inputs, targets = micro[:, :-1].contiguous(), micro[:, 1:].flatten()
        hidden = model.hidden(
            inputs,
            dtype=dtype,
            recompute=run.train.recompute,
            clip_above=run.optim.qk_clip if use_clip else None,
            keep_outputs=run.balance.orthogonality_coef > 0,
        )
        for layer, routing in hidden.routings.items():
            counters[layer].add(routing)  # once per forward, outside anything that recomputes
        states = hidden.states.flatten(0, 1)
        lm_loss = linear_cross_entropy(states, model.head_weight, targets, torch.ones_like(targets, dtype=torch.bool))
        counts = {layer: counter.counts for layer, counter in counters.items()}
        balance, terms = balance_objective(hidden.routings, run.balance, len(micro), counts)
        share = len(micro) / len(batch)
        ((lm_loss + balance) * share).backward()  # type: ignore[no-untyped-call]
        loss_sum += float(lm_loss.detach()) * share
        for name, value in terms.items():
            terms_sum[name] = terms_sum.get(name, 0.0) + float(value) * share
        for layer, largest_H in hidden.max_logits.items():
            largest[layer] = torch.maximum(largest[layer], largest_H) if layer in largest else largest_H

    norm = grad_norm(model.parameters())  # looked at before it scales anything: a NaN would hide where it came from
    objective = loss_sum + sum(terms_sum.values()) + float(norm)
    if not abs(objective) < float("inf"):  # true for NaN as well
        raise TrainingHalted(f"step {step}: {_culprit(model, loss_sum)} is not finite; no weight was changed")
    skipped = guard.observe(loss_sum, float(norm))
    if not skipped:
        if run.optim.grad_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), run.optim.grad_clip, norm)
        optimizers.set_lr(lr)
        optimizers.step()
        for layer, moe_layer in model.sparse_layers().items():
            if moe_layer.router.e_score_correction_bias is not None:
                counts_E = counters[layer].counts
                update_bias(moe_layer.router.e_score_correction_bias, counts_E, run.balance.bias_update_rate)
        for layer, largest_H in largest.items():
            assert run.optim.qk_clip is not None
            attention = model.get_submodule(f"layers.{layer}.self_attn")
            qk_clip_(attention, largest_H, run.optim.qk_clip, model.config.attention)
    return StepResult(loss_sum, terms_sum, float(norm), skipped, counters)


def _culprit(model: Decoder, loss: float) -> str:
    """The first weight, then the loss, then the first gradient that is NaN or Inf."""
    named = list(model.named_parameters())
    if weight := first_non_finite(named):
        return f"weight {weight}"
    if not abs(loss) < float("inf"):
        return "the loss"
    gradient = first_non_finite((name, p.grad) for name, p in named)
    return f"the gradient of {gradient}" if gradient else "a balance term"
