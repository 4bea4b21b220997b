"""The model under test: what training would do with it, and what it says about itself.

B sequences, S tokens, M micro-batches, E experts, T tokens.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from manyhands.check.verdict import one_hot
from manyhands.config import RunConfig
from manyhands.errors import TrainingHalted
from manyhands.models import Decoder, Hidden
from manyhands.moe import ExpertBank, Routing
from manyhands.train.guard import SpikeGuard
from manyhands.train.optim import Optimizers
from manyhands.train.step import train_step


class Subject(Decoder):
    """A decoder whose `hidden` draws from known seeds and keeps the routings it returned."""

    seeds: list[int]
    routings: list[dict[int, Routing]]

    def watch(self, seeds: list[int]) -> None:
        """Forget gradients and routings; the m-th forward from here on draws from `seeds[m]`."""
        self.zero_grad(set_to_none=True)
        self.seeds, self.routings = seeds, []

    def hidden(self, *args: Any, **kwargs: Any) -> Hidden:
        """`Decoder.hidden`, seeded and remembered."""
        torch.manual_seed(self.seeds[len(self.routings)])
        hidden = super().hidden(*args, **kwargs)
        self.routings.append(hidden.routings)
        return hidden

    def use(self, backend: str) -> None:
        """Run the experts through `backend`."""
        for module in self.modules():
            if isinstance(module, ExpertBank):
                module.implementation = backend


@dataclass(slots=True)
class Trained:
    """What one call of the real training step left behind."""

    loss: float
    terms: dict[str, float]
    routings: list[dict[int, Routing]]
    gradients: dict[str, Tensor | None]
    counts: dict[str, Tensor] = field(default_factory=dict)
    dropped: dict[str, Tensor] = field(default_factory=dict)
    bias: dict[str, Tensor] = field(default_factory=dict)
    """The buffers after the step: correction biases, and what else no gradient moves."""
    halted: str = ""


def gradients(module: torch.nn.Module) -> dict[str, Tensor | None]:
    """The gradient of every parameter, by full name."""
    return {name: None if p.grad is None else p.grad.detach().clone() for name, p in module.named_parameters()}


def train(model: Subject, batch: Tensor, run: RunConfig, dtype: torch.dtype, seeds: list[int]) -> Trained:
    """Run `train_step` on `batch` [B, S + 1] with optimisers that change nothing; the model is left as it was."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.watch(seeds)
    with torch.random.fork_rng(devices=[]):
        try:
            result = train_step(model, Optimizers([]), SpikeGuard(run.guard), batch, run, 1, 0.0, dtype)
        except TrainingHalted as error:
            return Trained(float("nan"), {}, model.routings, gradients(model), halted=str(error))
    trained = Trained(
        result.loss,
        result.terms,
        model.routings,
        gradients(model),
        {f"layers.{layer}.mlp.expert_counts": c.counts for layer, c in result.counters.items()},
        {f"layers.{layer}.mlp.dropped": c.dropped for layer, c in result.counters.items()},
        {name: buffer.clone() for name, buffer in model.named_buffers()},
    )
    for name, buffer in model.named_buffers():
        buffer.copy_(before[name])
    return trained


def dense_weights(routing: Routing) -> Tensor:
    """[T, E] float64: the weight of every chosen pair, 0 elsewhere."""
    dense = torch.zeros(len(routing.scores), routing.num_experts + 1, dtype=torch.float64)
    ids = torch.where(routing.expert_ids < 0, routing.num_experts, routing.expert_ids)
    return dense.scatter_add(1, ids, routing.weights.detach().double())[:, :-1]


def dense_kept(routing: Routing) -> Tensor:
    """[T, E] bool: pairs that are computed."""
    return one_hot(torch.where(routing.kept, routing.expert_ids, -1), routing.num_experts)
