"""One step: what a skipped update leaves alone, what clipping does, what QK-clip sees."""

from pathlib import Path
from typing import Any

import pytest
import torch

from manyhands.config import RunConfig
from manyhands.models import Decoder, init_weights
from manyhands.train import step
from manyhands.train.guard import SpikeGuard
from manyhands.train.optim import Optimizers, build_optimizers

from ..small_runs import small_run


def ready(*changes: str) -> tuple[RunConfig, Decoder, Optimizers, SpikeGuard, torch.Tensor]:
    run = small_run(Path("unused"), *changes)
    model = Decoder(run.model)
    init_weights(model, 0)
    ids = torch.randint(0, 300, (4, 33), generator=torch.Generator().manual_seed(0))
    return run, model.train(), build_optimizers(model, run.optim), SpikeGuard(run.guard), ids


def take(made: tuple[RunConfig, Decoder, Optimizers, SpikeGuard, torch.Tensor], number: int = 1) -> step.StepResult:
    run, model, optimizers, guard, ids = made
    return step.train_step(model, optimizers, guard, ids, run, number, 1e-2, torch.float32)


def everything(made: Any) -> dict[str, torch.Tensor]:
    state = {**made[1].state_dict(), **{f"optimizer {k}": v for k, v in made[2].state_dict().items()}}
    return {name: tensor.clone() for name, tensor in state.items()}


def test_a_skipped_update_leaves_weights_bias_and_optimiser_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    made = ready("balance.bias_update_rate=0.1", "model.attention.qk_norm=none", "optim.qk_clip=0.0001")
    take(made)
    before = everything(made)
    assert before["layers.1.mlp.router.e_score_correction_bias"].abs().max() > 0
    monkeypatch.setattr(made[3], "observe", lambda *pair: True)
    assert take(made, 2).skipped
    after = everything(made)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


@pytest.mark.parametrize("limit", [0.01, None])
def test_gradients_reach_the_optimiser_clipped(limit: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    made = ready(f"optim.grad_clip={'null' if limit is None else limit}")
    _, model, optimizers, *_ = made
    seen = []
    monkeypatch.setattr(optimizers, "step", lambda: seen.append(float(step.grad_norm(model.parameters()))))
    norm = take(made).grad_norm
    assert norm > 0.1 and seen == [pytest.approx(norm if limit is None else limit, rel=1e-3)]


def test_qk_clip_sees_every_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest logits are the whole batch's, wherever among the micro-batches they stand."""
    found: dict[str, list[torch.Tensor]] = {}
    for order in ("", "micro", "micro reversed"):
        size = "train.micro_batch_size=" + ("1" if order else "4")
        made = ready("model.attention.qk_norm=none", "optim.qk_clip=1e-6", size)
        if order.endswith("reversed"):
            made = (*made[:4], made[4].flip(0))
        seen = found[order] = []
        monkeypatch.setattr(step, "qk_clip_", lambda _, largest, *rest, seen=seen: seen.append(largest.clone()))
        take(made)
    for other in ("micro", "micro reversed"):
        for whole, parts in zip(found[""], found[other], strict=True):
            torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-6)
