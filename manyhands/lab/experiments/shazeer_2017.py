"""Shazeer et al. 2017 in small: more experts behind an LSTM at equal operations, and the ablation of the two losses.

E experts, K experts per token, F expert width, G groups.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch

from manyhands.checkpoint.find import find
from manyhands.checkpoint.model import RecurrentModel, load_model
from manyhands.config import RunConfig
from manyhands.lab.experiment import Criterion, Figure, Outcome
from manyhands.lab.figures import loss_chart
from manyhands.lab.job import Job
from manyhands.lab.language import Trained, arm, changed, regime, train_arm
from manyhands.moe.balance import cv_squared, gates

_FLAT, _TWO_LEVELS, _USUAL, _NONE = "MoE-256", "MoE-256-h", (0.1, 0.1), (0.0, 0.0)
_COEFFICIENTS = (_NONE, (0.2, 0.0), (0.0, 0.2), _USUAL, (1.0, 1.0))
_PUBLISHED = {"MoE-4": "45.0", "MoE-32": "39.7", "MoE-256": "35.7", "MoE-256-h": "36.0"}
_ABLATION = {
    _NONE: ("39.8", "17.80"),
    (0.2, 0.0): ("35.6", "1.47"),
    (0.0, 0.2): ("35.7", "1.15"),
    _USUAL: ("35.6", "1.14"),
    (1.0, 1.0): ("35.7", "1.07"),
}
"""Losses' weights (importance, load) -> perplexity, and the busiest expert's load over the mean: table 6."""


@dataclass(frozen=True, slots=True)
class _Seen:
    """One trained model on the validation text."""

    trained: Trained
    importance: float
    """Coefficient of variation of the experts' summed weights."""
    load: float
    """The same of their numbers of tokens."""
    busiest: float
    """The largest number of tokens over the mean."""

    @property
    def perplexity(self) -> float:
        return math.exp(self.trained.valid_loss)


def run(job: Job) -> Outcome:
    """Train every arm with each seed, then count who goes where on the validation text."""
    base = _base(job)
    size = (16, 2, 16, 4) if job.quick else (256, 4, 128, 16)
    E, K, F, G = size
    weights = (_NONE, _USUAL) if job.quick else _COEFFICIENTS
    runs = {_name(pair): _with(base, E, K, F, pair) for pair in weights}
    if not job.quick:
        runs["MoE-4"] = _with(base, K, K, F, _NONE)
        runs["MoE-32"] = _with(base, 32, K, F, _USUAL)
        runs[_TWO_LEVELS] = _with(base, E, K, F, _USUAL, f"select: hierarchical, n_group: {G}, topk_group: 2")
    found: dict[str, list[_Seen]] = {name: [] for name in runs}
    for seed in job.seeds:
        for name, each in runs.items():
            found[name].append(_look(train_arm(job, changed(each, f"train.seed={seed}"), f"{name}, seed {seed}")))
    names = {_name(_USUAL): f"{_FLAT} {_name(_USUAL)}"}
    return Outcome(
        tuple(arm(each, names.get(name, name)) for name, each in runs.items()),
        tuple(_figures(found, names)),
        _criteria(job, found),
        (loss_chart({n: [one.trained for one in seen] for n, seen in found.items()}, "Validation loss"),),
        notes=(
            "An arm that is named by two numbers is MoE-256 with these weights of the importance and the load loss. "
            "MoE-4 has four experts and uses all: its gate has nothing to choose.",
        ),
    )


def _base(job: Job) -> RunConfig:
    """The lab's text and batches; the model and the optimiser are the paper's in small."""
    text = regime(job, 500, 40, f"train.eval_every={20 if job.quick else 50}")
    run = {
        "data": text.data.model_dump(),
        "train": text.train.model_dump(exclude_defaults=True),
        "model": {"kind": "recurrent", "vocab_size": text.model.vocab_size, "hidden_size": text.model.hidden_size},
        "optim": {"name": "adamw", "lr": 0.004, "weight_decay": 0.0, "betas": (0.9, 0.99)},
        "schedule": {"warmup_steps": 10 if job.quick else 50, "decay_fraction": 0.0},
    }
    return RunConfig.model_validate(run)


def _with(
    base: RunConfig, E: int, K: int, F: int, weights: tuple[float, float], gate: str = "select: topk"
) -> RunConfig:
    noisy = "true" if E > K else "false"
    router = f"{{num_experts: {E}, num_experts_per_tok: {K}, noisy: {noisy}, init: zeros, {gate}}}"
    return changed(
        base,
        f"model.moe={{moe_intermediate_size: {F}, hidden_act: relu, router: {router}}}",
        f"balance={{aux_loss_coef: 0, importance_coef: {weights[0]}, load_coef: {weights[1]}}}",
    )


def _name(weights: tuple[float, float]) -> str:
    return f"({weights[0]:g}, {weights[1]:g})"


@torch.inference_mode()
def _look(trained: Trained) -> _Seen:
    """Importance and load over the validation text, as the experts are used there: without noise."""
    model = load_model(find(trained.directory))
    assert isinstance(model, RecurrentModel)
    importance, counts = torch.zeros(()), torch.zeros(())
    for ids, mask in trained.valid_batches(most=16):
        routing = model.hidden(ids[:, :-1], mask).routings[0]
        importance, counts = importance + gates(routing).sum(0), counts + routing.expert_counts()
    spread = [float(cv_squared(each).sqrt()) for each in (importance, counts)]
    return _Seen(trained, spread[0], spread[1], float(counts.max() / counts.mean()))


def _mean(seen: Sequence[_Seen], name: str) -> float:
    return fmean(getattr(one, name) for one in seen)


def _figures(found: Mapping[str, Sequence[_Seen]], names: Mapping[str, str]) -> list[Figure]:
    said = {_name(pair): figures for pair, figures in _ABLATION.items()}
    rows = []
    for name, seen in found.items():
        perplexity, busiest = said.get(name, (_PUBLISHED.get(name, ""), ""))
        for quantity, attribute, published in (
            ("perplexity", "perplexity", perplexity),
            ("CV(importance)", "importance", ""),
            ("CV(load)", "load", ""),
            ("busiest expert over the mean", "busiest", busiest),
        ):
            values = tuple(getattr(one, attribute) for one in seen)
            rows.append(Figure(quantity, names.get(name, name), values, digits=2, published=published))
    return rows


def _criteria(job: Job, found: Mapping[str, Sequence[_Seen]]) -> tuple[Criterion, ...]:
    none, usual = found[_name(_NONE)], found[_name(_USUAL)]
    busiest = _mean(none, "busiest"), _mean(usual, "busiest")
    text = f"busiest expert {busiest[0]:.1f} times the mean against {busiest[1]:.1f}"
    if job.quick:
        return (Criterion("the two losses balance", text, busiest[0] > busiest[1]),)
    perplexity = {name: _mean(seen, "perplexity") for name, seen in found.items()}
    few, some, many = perplexity["MoE-4"], perplexity["MoE-32"], perplexity[_name(_USUAL)]
    two_levels = perplexity[_TWO_LEVELS]
    return (
        Criterion(
            "at equal operations more experts give a lower perplexity: MoE-4 > MoE-32 > MoE-256",
            f"{few:.2f}, {some:.2f}, {many:.2f}",
            few > some > many,
        ),
        Criterion(
            "without the two losses the busiest expert has at least 4 times the share it has with (0.1, 0.1)",
            text,
            busiest[0] >= 4 * busiest[1],
        ),
        Criterion(
            "and the perplexity is worse",
            f"{perplexity[_name(_NONE)]:.2f} against {many:.2f}",
            perplexity[_name(_NONE)] > many,
        ),
        Criterion(
            "a two-level gate over 256 experts is within 2 % of the flat one",
            f"{two_levels:.2f} against {many:.2f}, {100 * (two_levels / many - 1):+.1f} %",
            abs(two_levels / many - 1) <= 0.02,
        ),
    )
