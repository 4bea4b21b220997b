"""`check --layout`: green on what is right, red on the faults everybody makes, each named."""

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from manyhands.check.diagnosis import diagnose
from manyhands.check.layout_jobs import LENGTH, parse_layouts, plain, row_of
from manyhands.check.layouts import WAYS, layout_rows
from manyhands.check.report import Row, Situation
from manyhands.config import RunConfig
from manyhands.errors import ConfigError
from manyhands.moe import exchange
from manyhands.parallel.group import Group
from manyhands.parallel.ranks import Ranks
from manyhands.parallel.shards import is_sharded, local
from manyhands.train import step
from manyhands.train.task import Count
from tests.gloo import on_processes

from ..forked import ForkedPopen
from ..small_runs import manyhands, small_run


def _config(*changes: str) -> RunConfig:
    return small_run(Path("unused"), "model.attention.qk_norm=none", "train.sequence_length=12", *changes)


def _mean_of_means(patch: pytest.MonkeyPatch, ranks: Group) -> None:
    real = step._total

    def wrong(counts: Any, of: Ranks) -> Count:
        counts = list(counts)
        total = real(counts, of)
        own = sum(count.targets for count in counts)
        return total if of.size == 1 else replace(total, targets=max(1, own) * of.size)

    patch.setattr(step, "_total", wrong)


def _experts_times_ep(patch: pytest.MonkeyPatch, ranks: Group) -> None:
    real = step.sum_gradients

    def wrong(params: Any, of: Ranks) -> None:
        params = list(params)
        real(params, of)
        for p in params:
            if is_sharded(p) and p.dim() == 3:
                p.grad *= 2

    patch.setattr(step, "sum_gradients", wrong)


def _norm_of_many(patch: pytest.MonkeyPatch, ranks: Group) -> None:
    real = step.grad_norm

    def wrong(params: Any, of: Ranks) -> torch.Tensor:
        params = list(params)
        right = real(params, of)
        if of.size == 1:
            return right
        experts = sum(local(p.grad).double().square().sum() for p in params if p.dim() == 3)
        return (right.square() + of.sum(experts) * (of.size - 1)).sqrt()

    patch.setattr(step, "grad_norm", wrong)


def _detached(patch: pytest.MonkeyPatch, ranks: Group) -> None:
    real = exchange.combine
    patch.setattr(exchange, "combine", lambda rows, weights, p: real(rows, weights.detach(), p))


def _counts_of_one(patch: pytest.MonkeyPatch, ranks: Group) -> None:
    patch.setattr(step, "summed", lambda counters, of: counters)
    patch.setattr(step, "_counts", lambda counters, of: {n: c.counts for n, c in counters.items()})


FAULTS: dict[str, tuple[Callable[[pytest.MonkeyPatch, Group], None], set[str], str]] = {
    "mean of means": (_mean_of_means, {"loss"}, "a mean of the processes' means"),
    "experts' gradients times ep": (_experts_times_ep, {"gradients of experts"}, "are 2 times one process's"),
    "experts counted by every process": (_norm_of_many, {"gradient norm"}, "the norm alone differs"),
    "a detached router": (_detached, {"gradients of routers"}, "lost their gradient on the way"),
    "counts of one process": (_counts_of_one, {"counts of experts", "bias"}, "counts are those of some processes"),
}


def _rows(ranks: Group) -> dict[str, list[Row]]:
    found = {}
    for name, (plant, _, _) in {"none": (lambda *_: None, set(), ""), **FAULTS}.items():
        with pytest.MonkeyPatch.context() as patch:
            plant(patch, ranks)
            run = _config()
            ways = WAYS if name == "none" else WAYS[:1]
            found[name] = list(layout_rows(run.model, run.balance, LENGTH, ranks, 2, 0, ways))
    return found


def test_green_and_each_planted_fault_is_named() -> None:
    every = on_processes(2, _rows)
    assert every[0]["none"] == every[1]["none"], "all processes see the same"
    found = every[0]
    clean = found.pop("none")
    assert len(clean) >= 22 and not [row.line() for row in clean if not row.ok]
    assert diagnose(clean, 1, 2) == []
    for name, rows in found.items():
        _, quantities, said = FAULTS[name]
        failed = {row.quantity for row in rows if not row.ok}
        assert quantities <= failed, (name, failed)
        assert any(said in line for line in diagnose(rows, 1, 2)), (name, failed, diagnose(rows, 1, 2))


def test_rows_survive_json() -> None:
    at = Situation("layout", "1x2", "eager", "float64", "muon")
    for row in (Row(at, "loss", "step 1", float("inf"), 1e-6, 0.5, ("step 1",)), Row(at, "bias", "", 0.0, 0.0, 1.0)):
        assert row_of(json.loads(json.dumps(plain(row)))) == row


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("2", "'2' is none: DPxEP, say 2x2 or 1x4,4x1"),
        ("2x2,", "'' is none"),
        ("0x2", "'0x2' is none"),
        ("1x1", "are 1 processes: 2 to 16"),
        ("9x9", "are 81 processes: 2 to 16"),
    ],
)
def test_a_layout_that_is_none(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_layouts(text)
    assert said in str(refused.value)


def test_layouts() -> None:
    assert parse_layouts("2x2, 1x4") == [(2, 2), (1, 4)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tiny", "--layout", "1x3"], "--layout 1x3: ep = 3 does not divide the 8 experts"),
        (["tiny", "--layout", "2x1", "--backend", "eager"], "goes with neither --backend nor --dtype"),
        (
            ["tiny", "model.moe.router.select=expert_choice", "model.moe.router.bias=false", "--layout", "2x1"],
            "model.moe.router.select = 'expert_choice' looks at all tokens of a batch",
        ),
    ],
)
def test_refused_before_anything_is_started(arguments: list[str], said: str) -> None:
    done = manyhands("check", *arguments)
    assert done.returncode == 2 and said in done.stderr


def test_from_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", ForkedPopen)
    done = manyhands("check", "tiny", "model.hidden_size=32", "model.vocab_size=64", "--layout", "1x2", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] and report["compared"] >= 20 and {row["case"] for row in report["rows"]} == {"1x2"}
