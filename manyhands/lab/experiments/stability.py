"""One sparse model, and what is said to keep its training steady, taken away or added one at a time.

E experts, F their width.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev

import numpy as np
import torch
from torch import Tensor

from manyhands.config import RunConfig
from manyhands.errors import TrainingHalted
from manyhands.files import JOURNAL
from manyhands.lab.experiment import Arm, Chart, Criterion, Curve, Figure, Outcome
from manyhands.lab.job import Job
from manyhands.lab.language import arm, changed, regime, train_arm, with_experts
from manyhands.lab.rounded_router import round_routers
from manyhands.lab.steady import spikes
from manyhands.models import LanguageModel
from manyhands.trace.journal import read_journal
from manyhands.train.task import Forward, LanguageModelling, Loss

_BASE, _INIT, _ROUNDED, _Z = "as it should be", "init × 1", "router in bfloat16", "with a z-loss"
_FAST = "rate × 4"
_RATE = 0.004


@dataclass(slots=True)
class _Watched(LanguageModelling):
    """Language modelling that remembers how large the router's logits are in each step."""

    rounded: bool
    """Whether the router computes in bfloat16."""
    largest: list[float] = field(default_factory=list)
    """The largest logit above its token's mean, of any layer."""
    sums: list[float] = field(default_factory=list)
    """Mean |log Σ exp(logits)| over tokens and layers."""

    def loss(self, model: LanguageModel, micro: Tensor, how: Forward) -> Loss:
        if self.rounded:
            round_routers(model)
        loss = LanguageModelling.loss(self, model, micro, how)
        logits_LTE = torch.stack([routing.logits.detach() for routing in loss.routings.values()])
        self.largest.append(float((logits_LTE - logits_LTE.mean(-1, keepdim=True)).max()))
        self.sums.append(float(logits_LTE.logsumexp(-1).abs().mean()))
        return loss


@dataclass(frozen=True, slots=True)
class _Run:
    """One arm with one seed."""

    valid_loss: float
    """Of a guess, if the run broke off."""
    norms: Sequence[float]
    watched: _Watched
    broke: bool
    """A loss or gradient was not finite."""


def run(job: Job) -> Outcome:
    """Train every arm with each seed."""
    base = regime(
        job,
        120,
        30,
        f"optim={{name: adamw, lr: {_RATE}, embed_lr_scale: 1, weight_decay: 0.0}}",
        "guard.spike_sigma=null",
    )
    E, F = (8, 32) if job.quick else (32, 128)
    sparse = _init(with_experts(base, E, 1, F), 0.1)
    fast = changed(sparse, f"optim.lr={4 * _RATE}")
    if job.quick:
        runs = {_BASE: sparse, _ROUNDED: sparse, _Z: changed(sparse, "balance.z_loss_coef=0.1")}
    else:
        runs = {}
        for also, of in (("", sparse), (f", {_FAST}", fast)):
            runs |= {
                (_BASE if not also else _FAST): of,
                f"{_INIT}{also}": _init(of, 1.0),
                f"{_ROUNDED}{also}": of,
                f"{_Z}{also}": changed(of, "balance.z_loss_coef=0.001"),
            }
    found: dict[str, list[_Run]] = {name: [] for name in runs}
    for seed in job.seeds:
        for name, of in runs.items():
            found[name].append(_train(job, changed(of, f"train.seed={seed}"), f"{name}, seed {seed}", _ROUNDED in name))
    return Outcome(
        tuple(_described(of, name) for name, of in runs.items()),
        tuple(_figures(found)),
        _criteria(job, found),
        (_chart(found),),
        notes=(
            "Init × 0.1 and × 1: normal with variance 0.1 or 1 over the width, divided by √(2·layers) where it writes "
            "into the residual stream; Switch compares the same two variances.",
            "A spike is a step whose gradient norm is more than twice the median of the 20 steps before it. A run "
            "whose loss or gradients were not finite broke off, and counts as a guess: ln of the vocabulary.",
            "The router in bfloat16 is an experiment's alone: no configuration asks for it, and a router of manyhands "
            "is float32 in every model.",
            "A logit counts from its token's mean, since one added to all of them changes nothing. The z-loss is on "
            "their log-sum-exp, ln E where they are all 0.",
        ),
    )


def _init(run: RunConfig, variance: float) -> RunConfig:
    return changed(run, f"model.initializer_range={math.sqrt(variance / run.model.hidden_size):.6f}")


def _described(run: RunConfig, name: str) -> Arm:
    z = run.balance.z_loss_coef
    note = "init × 0.1, router in float32, no z-loss" if name == _BASE else f"coefficient {z:g}" if z else ""
    return arm(run, name, note)


def _train(job: Job, run: RunConfig, name: str, rounded: bool) -> _Run:
    task, guess = _Watched(rounded), math.log(run.model.vocab_size)
    try:
        valid = train_arm(job, run, name, task).valid_loss
    except TrainingHalted:
        valid = math.nan
    norms = [record["grad_norm"] for record in read_journal(job.scratch / name / JOURNAL) if record["kind"] == "step"]
    broke = not math.isfinite(valid)
    return _Run(guess if broke else valid, norms, task, broke)


def _figures(found: Mapping[str, Sequence[_Run]]) -> list[Figure]:
    shown = []
    for name, each in found.items():
        shown.append(Figure("validation loss", name, tuple(one.valid_loss for one in each), "nats/token"))
        if len(each) > 1:
            shown.append(
                Figure("its standard deviation over seeds", name, (stdev(o.valid_loss for o in each),), digits=4)
            )
        shown += [
            Figure("largest router logit", name, tuple(max(one.watched.largest) for one in each), digits=2),
            Figure("log-sum-exp, last step", name, tuple(one.watched.sums[-1] for one in each), digits=2),
            Figure(
                "gradient norm, 99th percentile", name, tuple(float(np.quantile(o.norms, 0.99)) for o in each), digits=2
            ),
            Figure("spikes", name, tuple(float(spikes(one.norms)) for one in each), digits=0),
            Figure("broke off", name, tuple(float(one.broke) for one in each), digits=0),
        ]
    return shown


def _criteria(job: Job, found: Mapping[str, Sequence[_Run]]) -> tuple[Criterion, ...]:
    def loss(name: str) -> list[float]:
        return [one.valid_loss for one in found[name]]

    def log_sum(name: str) -> list[float]:
        return [one.watched.sums[-1] for one in found[name]]

    smaller = Criterion(
        "a z-loss brings the logits' log-sum-exp nearer to 0",
        f"{fmean(log_sum(_Z)):.2f} against {fmean(log_sum(_BASE)):.2f}",
        all(z < b for z, b in zip(log_sum(_Z), log_sum(_BASE), strict=True)),
    )
    if job.quick:
        return (smaller,)
    rounded, plain = f"{_ROUNDED}, {_FAST}", _FAST
    small = Criterion(
        "small first weights give a lower loss, with each seed",
        f"{fmean(loss(_BASE)):.3f} against {fmean(loss(_INIT)):.3f} nats/token",
        all(a < b for a, b in zip(loss(_BASE), loss(_INIT), strict=True)),
    )
    worse = Criterion(
        "a router in bfloat16 has a higher loss or breaks off, at the high rate, with each seed",
        f"{fmean(loss(rounded)):.3f} against {fmean(loss(plain)):.3f} nats/token",
        all(r.broke or r.valid_loss > p.valid_loss for r, p in zip(found[rounded], found[plain], strict=True)),
    )
    if len(job.seeds) < 2:
        return (small, worse, smaller)
    spread = {name: stdev(loss(name)) for name in (_BASE, _INIT)}
    return (
        small,
        Criterion(
            "and seeds that lie closer together",
            f"standard deviation {spread[_BASE]:.4f} against {spread[_INIT]:.4f}",
            spread[_BASE] < spread[_INIT],
        ),
        worse,
        smaller,
    )


def _chart(found: Mapping[str, Sequence[_Run]]) -> Chart:
    curves = [
        Curve(name, list(range(1, len(one.norms) + 1)), one.norms, faint=number > 0)
        for name, each in found.items()
        for number, one in enumerate(each)
    ]
    return Chart("Gradient norms", "step", "norm before clipping", tuple(curves), "One line per seed.", True)
