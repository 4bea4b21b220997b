"""A run's state before its first step: the model, new or from a checkpoint, its optimisers and its batches."""

import torch
from torch import nn

from manyhands.config import RunConfig
from manyhands.models import AnyModel, build, init_weights
from manyhands.parallel.ranks import Ranks
from manyhands.train.data import RunData
from manyhands.train.guard import SpikeGuard
from manyhands.train.optim import build_optimizers
from manyhands.train.start import Start
from manyhands.train.state import Progress, TrainState, pick_device
from manyhands.train.task import Task
from manyhands.train.trainable import freeze


def fresh_state(run: RunConfig, data: RunData, task: Task, ranks: Ranks, start: Start | None) -> TrainState:
    """The state at step 0, with the weights of `start` if there is one. Raises `CheckpointError` if it is damaged."""
    model = build(run.model, run.train.experts_implementation)
    seed_noise(model, run.train.seed)
    model.to(pick_device(run.train.device))
    init_weights(model, run.train.seed)
    if start is not None:
        start.load_into(model)
    model.train()
    freeze(model, run.trainable)
    optimizers = build_optimizers(model, run.optim)
    batches = task.batches(data, run, ranks)
    return TrainState(model, optimizers, batches, SpikeGuard(run.guard), Progress(max_steps=run.train.max_steps))


def seed_noise(model: AnyModel, seed: int) -> None:
    """The global generator as it always was when a run began: after torch's own filling of linear layers.

    `init_weights` must follow, for nothing drawn here is kept. Through it seeded runs with noise while training
    (noisy, jitter, random_second) repeat what they were.
    """
    torch.manual_seed(seed)
    for part in model.modules():
        if isinstance(part, nn.Linear):
            nn.Linear.reset_parameters(part)
        elif isinstance(part, nn.Embedding):
            part.reset_parameters()
