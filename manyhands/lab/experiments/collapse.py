"""The same sparse model with and without balancing, with a capacity and without, beside a dense one of equal FLOPs.

E experts, F their width.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from manyhands.compare.worth import ExpertWorth, expert_worth
from manyhands.config import RunConfig
from manyhands.lab.experiment import Chart, Criterion, Curve, Figure, Outcome
from manyhands.lab.figures import by_arm, figures, loss_chart, mean
from manyhands.lab.job import Job
from manyhands.lab.language import Trained, arm, changed, match_dense, regime, train_arm, with_experts

CAPACITY, CAPACITY_NONE = "capacity, auxiliary loss", "capacity, no balancing"
DROPLESS, DROPLESS_NONE = "dropless, auxiliary loss", "dropless, no balancing"
_SHOWN = (
    "validation loss", "validation", "validation minus training", "MaxVio, worst layer", "dead experts, worst layer",
    "dropped, worst layer", "gradient norm after warm-up, 99th percentile", "skipped updates",
)  # fmt: skip
_SHORT, _LONG = 300, 500
"""Steps with a capacity and without: dropless, a collapse takes longer to show in the loss."""
_TEXTS = 32
"""Validation texts that an expert's worth is measured on."""
_STARVED = 0.25
"""An expert with less than this part of an even share is called starved."""
_NOTHING = 1e-4
"""A rise of the loss below it, in nats per token, is none."""


def run(job: Job) -> Outcome:
    """Train the five arms with each seed; then silence each expert of the two dropless ones."""
    base = regime(job, _LONG, 24, "train.eval_every=" + ("12" if job.quick else "50"))
    E, F = (16, 32) if job.quick else (64, 128)
    dropless = with_experts(base, E, 1, F)
    limited = with_experts(base, E, 1, F, router="capacity_factor: 1.25, eval_capacity_factor: 2.0")
    short = f"train.max_steps={base.train.max_steps if job.quick else _SHORT}"
    runs = {
        "dense": match_dense(dropless),
        CAPACITY: changed(limited, short),
        CAPACITY_NONE: changed(limited, short, "balance.aux_loss_coef=0"),
        DROPLESS: dropless,
        DROPLESS_NONE: changed(dropless, "balance.aux_loss_coef=0"),
    }
    trained: dict[str, list[Trained]] = {name: [] for name in runs}
    for seed in job.seeds:
        for name, of in runs.items():
            trained[name].append(train_arm(job, changed(of, f"train.seed={seed}"), f"{name} {seed}"))
    worth = {name: [_worth(job, one) for one in trained[name]] for name in (DROPLESS, DROPLESS_NONE)}
    return Outcome(
        tuple(arm(of, name, _note(of)) for name, of in runs.items()),
        by_arm(figures(trained, _SHOWN), _worth_figures(worth, E)),
        _criteria(job, trained, worth, E),
        (
            loss_chart(trained, "Validation loss", "The same weights at the start, and the same batches."),
            _vio_chart(trained),
        ),
        notes=(
            "MaxVio and dead experts count what the router wanted, before a capacity drops anything; means over the "
            f"last 50 steps of what each batch had. MaxVio is {E - 1} when one expert takes every token.",
            "An expert is silenced: its tokens get nothing from it, and nothing else changes.",
        ),
    )


def _note(run: RunConfig) -> str:
    steps = f"{run.train.max_steps} steps"
    return steps if run.model.moe is None else f"{steps}, α {run.balance.aux_loss_coef:g}"


def _worth(job: Job, trained: Trained) -> list[ExpertWorth]:
    """What each expert's silence costs."""
    [(ids, _)] = trained.valid_batches(most=1)
    job.note(f"{trained.directory.name}: each expert silenced in turn")
    found = expert_worth(trained.load(), ids[: 4 if job.quick else _TEXTS])
    return [expert for layer in found.layers.values() for expert in layer.experts]


def _worth_figures(worth: Mapping[str, Sequence[Sequence[ExpertWorth]]], E: int) -> tuple[Figure, ...]:
    found = []
    for name, seeds in worth.items():
        missed = [100 * sum(abs(e.cost) >= _NOTHING for e in experts) / len(experts) for experts in seeds]
        few, rest = zip(*(_starved(experts, E) for experts in seeds), strict=True)
        share = [100 * len(starved) / len(experts) for starved, experts in zip(few, seeds, strict=True)]
        cost = "cost of silence, per token taken"
        found += [
            Figure("experts that are missed", name, tuple(missed), "%", 1),
            Figure("starved experts", name, tuple(share), "%", 1),
            Figure(f"{cost}: starved", name, tuple(map(_per_token, few)), "nats", 2),
            Figure(f"{cost}: others", name, tuple(map(_per_token, rest)), "nats", 2),
        ]
    return tuple(found)


def _starved(experts: Sequence[ExpertWorth], E: int) -> tuple[list[ExpertWorth], list[ExpertWorth]]:
    """Those that are, and the others."""
    few = [e for e in experts if e.share < _STARVED / E]
    return few, [e for e in experts if e.share >= _STARVED / E]


def _per_token(experts: Sequence[ExpertWorth]) -> float:
    """The rise of the loss, summed over experts, for each token that these had; 0 if they had none."""
    taken = sum(e.share for e in experts)
    return sum(e.cost for e in experts) / taken if taken else 0.0


def _criteria(
    job: Job, trained: Mapping[str, Sequence[Trained]], worth: Mapping[str, Sequence[Sequence[ExpertWorth]]], E: int
) -> tuple[Criterion, ...]:
    def of(name: str, what: str) -> float:
        return mean(trained[name], what)

    dropped, kept = of(CAPACITY_NONE, "dropped, worst layer"), of(CAPACITY, "dropped, worst layer")
    vio, even = of(DROPLESS_NONE, "MaxVio, worst layer"), of(DROPLESS, "MaxVio, worst layer")
    idle = [abs(e.cost) for name in worth for experts in worth[name] for e in experts if e.share == 0.0]
    useless = Criterion(
        "an expert that no token chooses is not missed",
        f"{len(idle)} of them, largest change {max(idle, default=0.0):.1e} nats",
        max(idle, default=0.0) <= 1e-6 if idle else None,
    )
    if job.quick:
        return (
            Criterion("without balancing MaxVio is larger", f"{vio:.1f} against {even:.1f}", vio > 1.5 * even),
            Criterion("and a capacity drops more", f"{dropped:.0f} against {kept:.0f} %", dropped > kept),
            useless,
        )
    loss = {name: [one.valid_loss for one in seeds] for name, seeds in trained.items()}
    at_short = [_loss_at(one, _SHORT) for one in trained["dense"]]
    cost = float(np.mean(loss[CAPACITY_NONE]) - np.mean(loss[CAPACITY]))
    behind = float(np.mean(loss[CAPACITY_NONE]) - np.mean(at_short))
    cost_dropless = float(np.mean(loss[DROPLESS_NONE]) - np.mean(loss[DROPLESS]))
    gain = float(np.mean(loss["dense"]) - np.mean(loss[DROPLESS]))
    dead, alive = of(DROPLESS_NONE, "dead experts, worst layer"), of(DROPLESS, "dead experts, worst layer")
    return (
        Criterion("with a capacity it costs at least 0.12 nats", f"{cost:+.3f}", cost >= 0.12),
        Criterion("at least 45 % are dropped, against at most 25 %", f"{dropped:.0f} against {kept:.0f} %",
                  dropped >= 45 and kept <= 25),
        Criterion("and the model is worse than a dense one", f"{behind:+.3f} nats", behind > 0),
        Criterion("dropless it costs at least 0.08 nats", f"{cost_dropless:+.3f}", cost_dropless >= 0.08),
        Criterion("MaxVio at least 20, against at most 5", f"{vio:.1f} against {even:.1f}", vio >= 20 and even <= 5),
        Criterion("at least 32 experts dead, against at most 10", f"{dead:.1f} against {alive:.1f}",
                  dead >= 32 and alive <= 10),
        Criterion("at least 40 % of what sparsity gains over the dense model is lost",
                  f"{100 * cost_dropless / gain:.0f} % of {gain:.3f} nats" if gain > 0 else "it gains nothing",
                  gain > 0 and cost_dropless >= 0.4 * gain),
        useless,
    )  # fmt: skip


def _loss_at(trained: Trained, step: int) -> float:
    """Validation loss after so many steps."""
    return trained.validation.losses[list(trained.validation.steps).index(step)]


def _vio_chart(trained: Mapping[str, Sequence[Trained]]) -> Chart:
    curves = []
    for name, seeds in trained.items():
        for number, one in enumerate(seeds):
            layers = one.run.model.sparse_layers
            if layers:
                worst = [max(record["moe"][str(layer)]["max_vio"] for layer in layers) for record in one.records]
                curves.append(Curve(name, one.training.steps, worst, faint=number > 0))
    return Chart("How fast it collapses", "step", "MaxVio, worst layer", tuple(curves), y_from_zero=True)
