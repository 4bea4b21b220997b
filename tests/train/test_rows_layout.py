"""Packed rows on a mesh of processes: the losses, gradients and evaluation of one process."""

from pathlib import Path

import numpy as np
import torch

from manyhands.config import RunConfig
from manyhands.models import AnyModel, Decoder, build, init_weights
from manyhands.parallel.group import Group, mesh_of
from manyhands.parallel.ranks import Alone, Ranks
from manyhands.parallel.shards import whole
from manyhands.text.packing import RowBatches, in_order
from manyhands.text.row_file import RowFile, write_rows
from manyhands.text.targets import Example
from manyhands.train.guard import SpikeGuard
from manyhands.train.layout import build_on
from manyhands.train.optim import Optimizers
from manyhands.train.preferences import PAIR, Preferences
from manyhands.train.rows import Rows, evaluate_rows
from manyhands.train.step import StepResult, train_step
from tests.gloo import on_processes

from ..small_runs import small_run

LIMIT = 1e-6  # of a tensor's largest: all but the router is float64, which rounds at 2⁻²⁴


def _rows(folder: Path) -> RowFile:
    """60 rows of 2 to 17 tokens, a third of which are learnt, one at least."""
    random, made = np.random.default_rng(0), []
    for n in random.integers(2, 18, 60).tolist():
        learnt = random.random(n) < 0.3
        learnt[0], learnt[-1] = False, True
        made.append(Example("x", random.integers(0, 300, n).astype(np.uint32), learnt))
    write_rows(folder / "rows.npy", made, 300)
    return RowFile.open(folder / "rows.npy", 300)


def _step(
    model: AnyModel, run: RunConfig, folder: Path, task: Rows, ranks: Ranks
) -> tuple[StepResult, dict[str, torch.Tensor], float]:
    """A step that changes nothing, its whole gradients, and the loss on all rows."""
    rows = RowFile.open(folder / "rows.npy", 300)
    preferences = isinstance(task, Preferences)
    group, known = (PAIR, np.linspace(-30, -10, len(rows))) if preferences else (1, None)
    sizes = 40, run.train.batch_size
    batches = RowBatches(rows, *sizes, 0, ranks.rank, ranks.size, group=group, reference=known)
    how = (run, 1, 0.0, torch.float64, task, ranks)
    result = train_step(model, Optimizers([]), SpikeGuard(run.guard), next(batches), *how)
    gradients = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    assert isinstance(model, Decoder)
    held_out = in_order(rows, *sizes, True, group, known)
    return result, gradients, evaluate_rows(model, held_out, torch.float64, ranks=ranks, task=task).loss


def _differences(ranks: Group, folder: Path) -> dict[str, float]:
    found = {}
    for ep in (1, 2):
        for task in (Rows(), Preferences(0.5)):
            settings = ["optim.grad_clip=null", "train.dtype=float32", "train.experts_implementation=eager"]
            run = small_run(Path("unused"), *settings, f"parallel.ep={ep}")
            one = build(run.model, "eager")
            init_weights(one, run.train.seed)
            mesh = mesh_of(ranks, ep)
            assert mesh is not None
            model = build_on(run, mesh, torch.device("cpu")).double().train()
            got, gradients, loss = _step(model, run, folder, task, ranks)
            want, right, alone = _step(one.double().train(), run, folder, task, Alone())
            where = f"{type(task).__name__}, ep {ep}"
            assert got.count == want.count and gradients.keys() == right.keys()
            found[f"{where}: loss"] = abs(got.loss - want.loss) / want.loss
            found[f"{where}: norm"] = abs(got.grad_norm - want.grad_norm) / want.grad_norm
            found[f"{where}: held out"] = abs(loss - alone) / alone
            for name, gradient in right.items():
                largest = float(gradient.abs().max()) or 1.0
                found[f"{where}: {name}"] = float((gradients[name] - gradient).abs().max()) / largest
    return found


def test_two_processes_learn_rows_as_one(tmp_path: Path) -> None:
    _rows(tmp_path)
    for found in on_processes(2, _differences, tmp_path):
        wrong = {what: error for what, error in found.items() if not error <= LIMIT}
        assert len(found) > 40 and not wrong
