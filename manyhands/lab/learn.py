"""A small model learns a made-up task, for questions that no text asks: how many facts it holds, how far it computes.

B sequences, S tokens each, V vocabulary.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from manyhands.config import RunConfig
from manyhands.config.decoder import as_decoder
from manyhands.lab.curves import Progress
from manyhands.lab.job import Job
from manyhands.layers.cross_entropy import linear_cross_entropy
from manyhands.models import Decoder, init_weights
from manyhands.moe import balance_objective
from manyhands.train.memory import keep_freed_memory
from manyhands.train.optim import build_optimizers
from manyhands.train.schedule import learning_rate


@dataclass(frozen=True, slots=True)
class Asked:
    """A batch of sequences, and what is to be answered where."""

    ids: Tensor
    """[B, S]: what the model reads."""
    targets: Tensor
    """[B, S]: the answer at each position."""
    mask: Tensor
    """[B, S] bool: where one is asked for."""


@dataclass(frozen=True, slots=True)
class Answers:
    """How a model did on some questions."""

    nats: float
    """Mean loss per answer."""
    right: Tensor
    """[B, S] bool: the likeliest answer is the right one, and one was asked for."""


@dataclass(frozen=True, slots=True)
class Learned:
    """A trained model and its way there."""

    model: Decoder
    """In evaluation mode."""
    progress: Progress
    """Loss of each step's batch, nats per answer."""


def learn(job: Job, run: RunConfig, batches: Iterator[Asked], name: str, model: Decoder | None = None) -> Learned:
    """Train a fresh model of `run` on what `batches` ask, with a clock running; or `model`, which is changed.

    Of `run` count model, balance, optim, schedule, `train.seed` and `train.max_steps`. A step is as in `train_step`,
    but without micro-batches, guard and bias controller, so a router's `bias` stays 0.
    """
    job.note(f"{name}: {run.train.max_steps} steps")
    if not job.quick:
        keep_freed_memory()
    torch.manual_seed(run.train.seed)
    if model is None:
        model = Decoder(as_decoder(run.model, "this experiment"))
        init_weights(model, run.train.seed)
    model.train()
    optimizers, steps = build_optimizers(model, run.optim), run.train.max_steps
    losses, seconds, began = list[float](), list[float](), time.perf_counter()
    with job.clock():
        for step in range(steps):
            batch = next(batches)
            hidden = model.hidden(batch.ids)
            states_TD, targets_T = hidden.states.flatten(0, 1), batch.targets.flatten()
            loss = linear_cross_entropy(states_TD, model.head_weight, targets_T, batch.mask.flatten(), model.head_bias)
            balance, _ = balance_objective(hidden.routings, run.balance, len(batch.ids))
            optimizers.zero_grad()
            (loss + balance).backward()  # type: ignore[no-untyped-call]
            if run.optim.grad_clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), run.optim.grad_clip)
            optimizers.set_lr(learning_rate(step, steps, run.optim.lr, run.schedule))
            optimizers.step()
            losses.append(float(loss.detach()))
            seconds.append(time.perf_counter() - began)
    return Learned(model.eval(), Progress(list(range(1, steps + 1)), seconds, losses))


@torch.no_grad()
def ask(model: Decoder, asked: Asked) -> Answers:
    """The model's answers, without training on them."""
    logits_BSV = model(asked.ids).logits
    nats = torch.nn.functional.cross_entropy(logits_BSV[asked.mask], asked.targets[asked.mask])
    return Answers(float(nats), (logits_BSV.argmax(-1) == asked.targets) & asked.mask)
