"""Memory and computing, each with experts and without, at equal active FLOPs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from manyhands.config import RunConfig
from manyhands.config.load import parse_run
from manyhands.lab.curves import Progress, ratios, smoothed
from manyhands.lab.experiment import Arm, Chart, Criterion, Curve, Figure, Outcome
from manyhands.lab.job import Job
from manyhands.lab.language import arm, changed, match_dense, with_experts
from manyhands.lab.learn import ask, learn
from manyhands.lab.made_up import CORNERS, KEY, SYMBOLS, VALUE, Facts, walks
from manyhands.plan.count import count_model

_RUN = """
model: {hidden_size: 32, num_hidden_layers: 2, attention: {num_attention_heads: 2, head_dim: 16, qk_norm: head}}
optim: {name: adamw, lr: 0.006, weight_decay: 0.0}
schedule: {warmup_steps: 50, decay_fraction: 0.3, min_ratio: 0.02}
balance: {aux_loss_coef: 0.01}
"""
_SMALL = ("model.hidden_size=16", "model.attention.head_dim=8", "optim.lr=0.02")
_SMOOTH = 20
"""Steps over which a loss is averaged before it is compared."""
_EDGES, _WALKS = 8, 64
_DENSE, _SPARSE, _DEEP = "dense", "64 experts, 2 active", "dense, twice as deep"


@dataclass(frozen=True, slots=True)
class _Memory:
    """One model that read the facts."""

    recalled: float
    """Share of the facts whose whole value it knows."""
    bits: float
    """What it knows of the values, by its loss."""
    progress: Progress


@dataclass(frozen=True, slots=True)
class _Computing:
    """One model that walked."""

    right: Sequence[float]
    """Share of the walks where it knows the corner after so many edges; nothing is asked after none."""
    progress: Progress


def run(job: Job) -> Outcome:
    """Facts: dense against sparse. Walks: the same two, and a dense model of twice the depth."""
    basis = parse_run(_RUN, "capacity", _SMALL if job.quick else ())
    facts = Facts(1000 if job.quick else 4000, seed=123)
    readers = _arms(basis, SYMBOLS + 1, KEY + VALUE, 120 if job.quick else 800)
    walkers = _arms(changed(basis, "optim.lr=0.003"), CORNERS + 1, 1 + _EDGES, 20 if job.quick else 1000)
    deeper = changed(walkers[_DENSE], f"model.num_hidden_layers={2 * basis.model.num_hidden_layers}")
    memory = {name: [_read(job, each, facts, name, seed) for seed in job.seeds] for name, each in readers.items()}
    computing = {
        name: [_walk(job, each, name, seed) for seed in job.seeds] for name, each in {**walkers, _DEEP: deeper}.items()
    }
    arms = _described(readers, "facts") + _described({**walkers, _DEEP: deeper}, "walks")
    charts = (
        _chart("Facts", {name: [found.progress for found in each] for name, each in memory.items()}, "a symbol"),
        _chart("Walks", {name: [found.progress for found in each] for name, each in computing.items()}, "a corner"),
    )
    parameters = {name: count_model(each.model).total for name, each in readers.items()}
    figures = (*_of_memory(memory, parameters, facts), *_of_computing(computing))
    return Outcome(arms, figures, tuple(_judged(job, memory, parameters)), charts, notes=_NOTES)


_NOTES = (
    "What is stored is what the loss says is known: facts × symbols × (log₂ 64 − loss in bits). The dense model is "
    "full, the sparse one has room left, so its bits per parameter are no capacity.",
    "Nothing was stated beforehand of the walks: they show whether experts help where there is nothing to remember. A "
    f"guess is right once in {CORNERS}.",
)


def _arms(basis: RunConfig, vocabulary: int, length: int, steps: int) -> dict[str, RunConfig]:
    asked = changed(
        basis,
        f"model.vocab_size={vocabulary}",
        f"model.max_position_embeddings={length}",
        f"train.sequence_length={length}",
        f"train.max_steps={steps}",
    )
    sparse = with_experts(asked, 64, 2, 32)
    return {_DENSE: match_dense(sparse), _SPARSE: sparse}


def _read(job: Job, run: RunConfig, facts: Facts, name: str, seed: int) -> _Memory:
    learned = learn(
        job, changed(run, f"train.seed={seed}"), facts.batches(min(500, facts.count // 4), seed), f"facts, {name}"
    )
    asked = facts.all()
    answers = ask(learned.model, asked)
    whole = (answers.right | ~asked.mask).all(1)
    bits = facts.bits - answers.nats / math.log(2) * facts.count * VALUE
    return _Memory(float(whole.float().mean()), bits, learned.progress)


def _walk(job: Job, run: RunConfig, name: str, seed: int) -> _Computing:
    learned = learn(job, changed(run, f"train.seed={seed}"), walks(_WALKS, _EDGES, seed), f"walks, {name}")
    answers = ask(learned.model, next(walks(2048, _EDGES, 1_000_000)))
    return _Computing(answers.right.float().mean(0).tolist(), learned.progress)


def _of_memory(memory: Mapping[str, Sequence[_Memory]], parameters: Mapping[str, int], facts: Facts) -> list[Figure]:
    figures = []
    for name, found in memory.items():
        per_parameter = tuple(each.bits / parameters[name] for each in found)
        figures += [
            Figure("facts recalled whole", name, tuple(100 * each.recalled for each in found), "%", 1),
            Figure(f"stored, of {facts.bits / 1000:.0f} kbit", name, tuple(e.bits / 1000 for e in found), "kbit", 1),
            Figure("stored per parameter", name, per_parameter, "bits", 2, "about 2" if name == _DENSE else ""),
        ]
    pairs = list(zip(memory[_DENSE], memory[_SPARSE], strict=True))
    sooner = [ratio for dense, sparse in pairs if (ratio := _sooner(dense.progress, sparse.progress)) is not None]
    if sooner:
        figures += [
            Figure("sooner at the dense model's best loss, by steps", "", tuple(s for s, _ in sooner), "times", 2),
            Figure("the same, by clock", "", tuple(c for _, c in sooner), "times", 2),
        ]
    return figures


def _of_computing(computing: Mapping[str, Sequence[_Computing]]) -> list[Figure]:
    return [
        Figure(
            f"corner known after {edges} edges",
            f"walks, {name}",
            tuple(100 * e.right[edges - 1] for e in found),
            "%",
            1,
        )
        for name, found in computing.items()
        for edges in (2, 4, _EDGES)
    ]


def _sooner(dense: Progress, sparse: Progress) -> tuple[float, float] | None:
    """How many times sooner the sparse model was where the dense one's best is, by steps and by clock."""
    found = ratios(smoothed(dense, _SMOOTH), smoothed(sparse, _SMOOTH))
    return (found[-1].by_steps, found[-1].by_clock) if found else None


def _judged(job: Job, memory: Mapping[str, Sequence[_Memory]], parameters: Mapping[str, int]) -> list[Criterion]:
    recalled = {name: [each.recalled for each in found] for name, found in memory.items()}
    if job.quick:
        text = f"{max(recalled[_DENSE]):.1%} against {min(recalled[_SPARSE]):.1%}"
        held = min(recalled[_SPARSE]) > max(recalled[_DENSE])
        return [Criterion("the sparse model recalls more facts", text, held)]
    density = [each.bits / parameters[_DENSE] for each in memory[_DENSE]]
    pairs = zip(memory[_DENSE], memory[_SPARSE], strict=True)
    clock = [found[1] for d, s in pairs if (found := _sooner(d.progress, s.progress)) is not None]
    ratio = min(clock, default=0.0)
    return [
        Criterion(
            "the dense model recalls at most 20 % of the facts",
            f"{max(recalled[_DENSE]):.1%}",
            max(recalled[_DENSE]) <= 0.2,
        ),
        Criterion(
            "the sparse model recalls at least 90 %", f"{min(recalled[_SPARSE]):.1%}", min(recalled[_SPARSE]) >= 0.9
        ),
        Criterion(
            "the dense model stores 1.7 to 2.4 bits per parameter",
            " and ".join(f"{d:.2f}" for d in density),
            all(1.7 <= d <= 2.4 for d in density),
        ),
        Criterion(
            "the sparse model has the dense one's best loss in at most half the time",
            f"{ratio:.2f} times sooner",
            ratio >= 2.0 if job.quiet else None,
        ),
    ]


def _described(runs: Mapping[str, RunConfig], task: str) -> tuple[Arm, ...]:
    return tuple(arm(each, f"{task}, {name}") for name, each in runs.items())


def _chart(title: str, arms: Mapping[str, Sequence[Progress]], unit: str) -> Chart:
    curves = [
        Curve(name, each.steps, each.losses, faint=number > 0)
        for name, found in arms.items()
        for number, each in enumerate(smoothed(progress, _SMOOTH) for progress in found)
    ]
    return Chart(title, "step", f"nats per answer ({unit})", tuple(curves), f"Mean over {_SMOOTH} steps.", True)
