"""One model under ever less room per expert, down to half of what perfect balance would need."""

import itertools
from collections.abc import Mapping, Sequence

from manyhands.lab.experiment import Chart, Criterion, Curve, Figure, Outcome
from manyhands.lab.figures import by_arm, figures, loss_chart, mean
from manyhands.lab.job import Job
from manyhands.lab.language import Trained, arm, changed, regime, train_arm, with_experts

_FACTORS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
_DROPLESS = "dropless"
_SHOWN = ("validation loss", "validation", "dropped, worst layer", "MaxVio, worst layer", "time of a step")


def run(job: Job) -> Outcome:
    """Train each with each seed; evaluate with the room of training, and with room for all."""
    base = regime(job, 300, 20, "train.eval_every=" + ("10" if job.quick else "50"))
    E, F = (16, 32) if job.quick else (64, 128)
    factors = (0.5, 1.0, 2.0) if job.quick else _FACTORS
    names = {f"capacity factor {factor:g}": factor for factor in factors}
    runs = {
        name: with_experts(base, E, 1, F, router=f"capacity_factor: {factor}, eval_capacity_factor: {factor}")
        for name, factor in names.items()
    } | {_DROPLESS: with_experts(base, E, 1, F)}
    trained: dict[str, list[Trained]] = {name: [] for name in runs}
    for seed in job.seeds:
        for name, of in runs.items():
            trained[name].append(train_arm(job, changed(of, f"train.seed={seed}"), f"{name} {seed}"))
    room = tuple(
        Figure("change of the loss with room for all at evaluation", name, tuple(map(_room_for_all, trained[name])),
               "nats/token")
        for name in names
    )  # fmt: skip
    chart = Chart(
        "What is dropped, and what it costs",
        "capacity factor",
        "validation loss, nats/token",
        (
            Curve("with the room of training", factors, [mean(trained[name], "validation loss") for name in names]),
            Curve("dropless", factors, [mean(trained[_DROPLESS], "validation loss")] * len(factors), faint=True),
        ),
    )
    return Outcome(
        tuple(arm(of, name) for name, of in runs.items()),
        by_arm(figures(trained, _SHOWN), room),
        _criteria(job, trained, list(names)),
        (chart, loss_chart(trained, "Validation loss")),
        notes=(
            "A token that an expert has no room for passes by: nothing is added to it in that layer. At factor 1 "
            "perfect balance would just fit.",
        ),
    )


def _room_for_all(trained: Trained) -> float:
    """The loss without a capacity, minus the loss with it."""
    model = trained.load()
    for layer in model.sparse_layers().values():
        layer.router.config = layer.router.config.model_copy(update={"eval_capacity_factor": None})
    return trained.loss_of(model) - trained.valid_loss


def _criteria(job: Job, trained: Mapping[str, Sequence[Trained]], names: Sequence[str]) -> tuple[Criterion, ...]:
    dropped = [mean(trained[name], "dropped, worst layer") for name in names]
    falls = Criterion(
        "the more room, the less is dropped",
        " > ".join(f"{share:.1f}" for share in dropped) + " %",
        all(before > after for before, after in itertools.pairwise(dropped)),
    )
    none = mean(trained[_DROPLESS], "dropped, worst layer")
    nothing = Criterion("without a capacity nothing is", f"{none:.1f} %", none == 0.0)
    if job.quick:
        return falls, nothing
    loss = {name: mean(seeds, "validation loss") for name, seeds in trained.items()}
    tight, wide = loss[names[0]] - loss[_DROPLESS], loss[names[-1]] - loss[_DROPLESS]
    return (
        falls,
        nothing,
        Criterion("half the room costs quality", f"{tight:+.3f} nats against dropless", tight > 0.02),
        Criterion("twice the room costs less than half of that", f"{wide:+.3f} nats", wide < tight / 2),
    )
