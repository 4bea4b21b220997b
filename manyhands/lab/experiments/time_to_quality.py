"""Two learning curves, of a dense and of a sparse model of equal active FLOPs, and their ratio at every loss."""

from collections.abc import Mapping, Sequence

from manyhands.config.decoder import as_decoder
from manyhands.lab.curves import Ratio, ratios, smoothed
from manyhands.lab.experiment import Criterion, Figure, Outcome
from manyhands.lab.figures import by_arm, figures, loss_chart
from manyhands.lab.job import Job
from manyhands.lab.language import Trained, arm, changed, match_dense, regime, train_arm, with_experts
from manyhands.lab.sooner import at, ratio_chart, ratio_figures
from manyhands.plan.count import count_model

_WINDOW = 40
"""Steps over which training losses are averaged."""
_SHOWN = ("validation loss", "validation", "training loss, last 50 steps", "MaxVio, worst layer", "time of a step")


def run(job: Job) -> Outcome:
    """Train both with each seed, take the ratios."""
    base = regime(job, 1000, 40, f"train.eval_every={10 if job.quick else 50}")
    E, K, F = (16, 2, 32) if job.quick else (64, 2, 64)
    sparse_run = with_experts(base, E, K, F)
    dense_run = match_dense(sparse_run)
    trained: dict[str, list[Trained]] = {"dense": [], "sparse": []}
    for seed in job.seeds:
        for name, run in (("dense", dense_run), ("sparse", sparse_run)):
            trained[name].append(train_arm(job, changed(run, f"train.seed={seed}"), f"{name}-{seed}"))
    arms = (
        arm(dense_run, "dense", f"feed-forward width {as_decoder(dense_run.model).intermediate_size}"),
        arm(sparse_run, "sparse", f"{E} experts of width {F}, top-{K}"),
    )
    pairs = list(zip(trained["dense"], trained["sparse"], strict=True))
    found = [ratios(dense.validation, sparse.validation) for dense, sparse in pairs]
    if not all(found):
        none = Criterion("the sparse model reaches the dense one's losses", "it reached none of them", False)
        return Outcome(arms, figures(trained, _SHOWN), (none,))
    return Outcome(
        arms,
        by_arm(figures(trained, _SHOWN), _saturation(trained), _ratio_figures(pairs, found)),
        _criteria(job, pairs, found),
        (
            loss_chart(trained, "Validation loss", "Equal active FLOPs, the same batches."),
            ratio_chart(found, "dense", "token"),
        ),
        notes=(
            "Quality is the loss on text that neither model trained on. The nearer the dense model is to all it can "
            "learn, the larger the ratio: scripts/time_to_quality.py takes it further.",
        ),
    )


def _saturation(trained: Mapping[str, Sequence[Trained]]) -> tuple[Figure, ...]:
    """How near each is to all that it can learn."""
    found = []
    for name, several in trained.items():
        run, parameters = several[0].run, count_model(several[0].run.model).total
        tokens = run.train.max_steps * run.train.batch_size * run.train.sequence_length
        gained = []
        for one in several:
            losses = one.validation.losses
            gained.append(losses[len(losses) // 2 - 1] - losses[-1])
        found += [
            Figure("tokens seen, per parameter", name, (tokens / parameters,), digits=1),
            Figure("gained in the second half of the steps", name, tuple(gained), "nats/token"),
        ]
    return tuple(found)


def _ratio_figures(pairs: Sequence[tuple[Trained, Trained]], found: list[list[Ratio]]) -> tuple[Figure, ...]:
    steps = pairs[0][0].run.train.max_steps
    shown = ratio_figures(found, steps, "dense")
    window = min(_WINDOW, steps // 4)
    trained = [ratios(smoothed(dense.training, window), smoothed(sparse.training, window)) for dense, sparse in pairs]
    if all(trained):
        values = tuple(one[-1].by_steps for one in trained)
        shown.append(
            Figure(f"on training losses, means of {window} steps, at the last: by steps", "ratio", values, "×", 2)
        )
    return tuple(shown)


def _criteria(job: Job, pairs: Sequence[tuple[Trained, Trained]], found: list[list[Ratio]]) -> tuple[Criterion, ...]:
    steps = pairs[0][0].run.train.max_steps
    last = [at(one, steps) for one in found]
    by_steps, by_clock = min(r.by_steps for r in last), min(r.by_clock for r in last)
    half = min(at(one, steps / 2).by_steps for one in found)
    if job.quick:
        falls = [arm.validation.losses[0] - arm.validation.losses[-1] for pair in pairs for arm in pair]
        return (
            Criterion("both learn", f"by {min(falls):.2f} nats at least", min(falls) > 0.2),
            Criterion("the sparse model is there sooner (not judged at this size)", f"{by_steps:.2f}×", None),
        )
    where = "at the best loss of the dense model"
    if any(one[-1].loss > min(dense.validation.losses) for one, (dense, _) in zip(found, pairs, strict=True)):
        return (Criterion(f"at least 1.7 times sooner by steps, {where}", "the sparse one never reached it", False),)
    return (
        Criterion(f"at least 1.7 times sooner by steps, {where}", f"{by_steps:.2f}×", by_steps >= 1.7),
        Criterion(f"more than 1.3 times by clock, {where}", f"{by_clock:.2f}×", by_clock > 1.3 if job.quiet else None),
        Criterion("still growing: larger than at half of the steps", f"{half:.2f} → {by_steps:.2f}×", by_steps > half),
    )
