"""Arms of the lab's regime, through the trainer."""

from pathlib import Path

import pytest

from manyhands.config import RunConfig
from manyhands.config.load import parse_run
from manyhands.lab.curves import smoothed
from manyhands.lab.job import Job
from manyhands.lab.language import REGIME, arm, changed, match_dense, regime, train_arm, with_experts
from manyhands.plan.count import count_model

from ..small_runs import write_text


def job(folder: Path, data: Path | None = None) -> Job:
    scratch = folder / "scratch"
    scratch.mkdir()
    return Job(True, (0,), scratch, data)


def test_an_arm_is_a_run_of_the_trainer(tmp_path: Path) -> None:
    lab = job(tmp_path, write_text(tmp_path))
    base = regime(lab, 1000, 6, "train.eval_every=2", "train.batch_size=4", "train.sequence_length=32")
    sparse = with_experts(base, 8, 1, 16, router="capacity_factor: 1.0, init: switch")
    router = sparse.model.moe.router
    assert (router.num_experts, router.num_experts_per_tok) == (8, 1)
    assert (router.capacity_factor, router.init) == (1.0, "switch")
    found = train_arm(lab, sparse, "sparse")
    assert list(found.training.steps) == [1, 2, 3, 4, 5, 6] and list(found.validation.steps) == [2, 4, 6]
    assert list(found.validation.seconds) == [found.training.seconds[i] for i in (1, 3, 5)]
    assert len(found.grad_norms) == 6 and min(found.grad_norms) > 0 and found.skipped == 0
    assert found.train_loss == pytest.approx(sum(found.training.losses) / 6)
    assert set(found.layer_means("dropped")) == {0, 1} and 0 < found.worst("dropped") < 1
    assert found.valid_loss == found.validation.losses[-1] < found.validation.losses[0]
    assert len(lab.clocks) == 1 and lab.clocks[0].seconds > found.training.seconds[-1] > 0
    assert smoothed(found.training, 6).losses == pytest.approx([found.train_loss])

    assert found.loss_of(found.load()) == pytest.approx(found.valid_loss, abs=1e-6)
    [(ids, mask)] = found.valid_batches(most=1)
    assert list(ids.shape) == [4, 33] and bool(mask.all())

    again = train_arm(lab, changed(sparse, "balance.aux_loss_coef=0"), "again")
    assert again.run.balance.aux_loss_coef == 0 and again.training.losses[0] == found.training.losses[0]
    assert again.training.losses[-1] != found.training.losses[-1]
    assert set(again.layer_means("max_vio")) == {0, 1}
    dense = train_arm(lab, match_dense(sparse), "dense")
    assert dense.layer_means("max_vio") == {} and dense.run.model.moe is None


@pytest.mark.parametrize(("E", "K", "F", "more"), [(64, 2, 64, ""), (8, 1, 40, ""), (16, 2, 24, "n_shared_experts: 1")])
def test_the_dense_rival_has_as_many_flops_and_hardly_more(E: int, K: int, F: int, more: str) -> None:
    sparse = with_experts(parse_run(REGIME, "test"), E, K, F, more=more)
    dense = match_dense(sparse)
    assert dense.model.intermediate_size % 8 == 0 and dense.model.moe is None
    below = changed(dense, f"model.intermediate_size={dense.model.intermediate_size - 8}")
    wanted = active(sparse)
    assert active(below) < wanted <= active(dense)
    assert arm(sparse, "s").flops <= arm(dense, "d").flops <= 1.03 * arm(sparse, "s").flops
    assert arm(dense, "d").parameters == count_model(dense.model).total


def test_the_published_recipe(tmp_path: Path) -> None:
    run = regime(Job(False, (0,), tmp_path), 1000, 60)
    assert (run.data.sources, run.train.max_steps) == (("stdlib",), 1000)
    assert run.train.batch_size * run.train.sequence_length == 8192
    sparse = with_experts(run, 64, 2, 64)
    assert match_dense(sparse).model.intermediate_size == 152
    assert count_model(sparse.model).total == 2_486_912 and count_model(match_dense(sparse).model).total == 202_880


def active(run: RunConfig) -> int:
    return count_model(run.model).active_without_embedding
