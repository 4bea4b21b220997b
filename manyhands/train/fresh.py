"""A run's state before its first step: the model, new or from a checkpoint, its optimisers and its batches."""

import numpy as np
import torch
from torch import nn

from manyhands.checkpoint.tuned import Tuned, described
from manyhands.config import RunConfig
from manyhands.models import AnyModel, build, init_weights
from manyhands.models.tuned import adapt
from manyhands.parallel.group import Mesh
from manyhands.parallel.ranks import Ranks
from manyhands.train.data import RunData
from manyhands.train.guard import SpikeGuard
from manyhands.train.layout import build_on, lay_out
from manyhands.train.optim import build_optimizers
from manyhands.train.start import Start
from manyhands.train.state import Progress, TrainState, pick_device
from manyhands.train.task import Task
from manyhands.train.together import check_together
from manyhands.train.trainable import freeze


def fresh_state(
    run: RunConfig,
    data: RunData,
    task: Task,
    ranks: Ranks,
    start: Start | None,
    mesh: Mesh | None = None,
    own: AnyModel | None = None,
) -> TrainState:
    """The state at step 0, with the weights of `start` if there is one, sharded over `mesh` if there is one; or of the
    model that is there, the caller's `own`.

    Raises `CheckpointError` if the start is damaged, `ConfigError` for what only one process can train.
    """
    if own is not None:
        torch.manual_seed(run.train.seed)  # of what is noisy while training
        model = own.to(pick_device(run.train.device))
    elif mesh is None:
        model = _model(run, start)
    else:
        check_together(run, ranks.size)
        model = (_beside if run.saves_changes else _sharded)(run, ranks, start, mesh)
    model.train()
    if not run.saves_changes:
        freeze(model, run.trainable)
    optimizers = build_optimizers(model, run.optim)
    batches = task.batches(data, run, ranks)
    progress = Progress(max_steps=run.train.max_steps)
    return TrainState(model, optimizers, batches, SpikeGuard(run.guard), progress, _tuned(run, start))


def _tuned(run: RunConfig, start: Start | None) -> Tuned | None:
    if not run.saves_changes:
        return None
    assert run.tune is not None and start is not None
    return Tuned(tune=run.tune, base=described(start.described()))


def _model(run: RunConfig, start: Start | None) -> AnyModel:
    device = pick_device(run.train.device)
    if run.saves_changes:
        assert run.tune is not None and start is not None
        torch.manual_seed(run.train.seed)  # of what is noisy while training
        # what is frozen need not be float32; but where that is computed in, a weight is widened once, not in each step
        dtype = torch.float32 if run.train.dtype == "float32" else None
        model = start.model(run.train.experts_implementation, dtype, device)
        adapt(model, run.tune, run.train.seed)
        return model
    model = build(run.model, run.train.experts_implementation)
    seed_noise(model, run.train.seed)
    model.to(device)
    init_weights(model, run.train.seed)
    if start is not None:
        start.load_into(model)
    return model


def _beside(run: RunConfig, ranks: Ranks, start: Start | None, mesh: Mesh) -> AnyModel:
    """What is trained is small: each process has all of it, beside the base's files, which one machine maps once. Only
    with `parallel.ep` do experts, and what stands beside them, lie on different processes."""
    model = _model(run, start)
    seed_rank(run.train.seed, ranks)
    if mesh.ep.size() > 1:
        lay_out(model, mesh, run.parallel.dispatch, getattr(torch, run.train.dtype))
    return model


def _sharded(run: RunConfig, ranks: Ranks, start: Start | None, mesh: Mesh) -> AnyModel:
    model = build_on(run, mesh, pick_device(run.train.device))
    seed_rank(run.train.seed, ranks)
    if start is not None:
        start.load_into(model)
    return model


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


def seed_rank(seed: int, ranks: Ranks) -> None:
    """The global generator of one of several processes: noise while training differs from rank to rank."""
    state = np.random.SeedSequence([seed % (1 << 64), ranks.rank]).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]) % (1 << 63))
