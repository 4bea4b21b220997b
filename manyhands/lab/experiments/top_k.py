"""The same experts, whole or cut in two: one of E per token, or two of 2·E half as wide. Several seeds of each.

E experts, F their width.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import stdev

from manyhands.lab.arms import by_arm, train_arms
from manyhands.lab.experiment import Criterion, Figure, Outcome
from manyhands.lab.figures import figures, loss_chart, mean
from manyhands.lab.job import Job
from manyhands.lab.language import Trained, arm, regime, with_experts
from manyhands.lab.steady import spikes, variance_test

_ONE, _TWO = "one per token", "two per token"
_SHOWN = ("validation loss", "MaxVio, worst layer", "gradient norm after warm-up, 99th percentile", "skipped updates")
_LEVEL = 0.05
"""Of the test: how rarely chance alone may give such a ratio of variances."""


def run(job: Job) -> Outcome:
    """Train both with each seed, compare their spread."""
    base = regime(job, 250, 30, "train.eval_every=" + ("15" if job.quick else "50"))
    E, F = (8, 32) if job.quick else (32, 128)
    runs = {_ONE: with_experts(base, E, 1, F), _TWO: with_experts(base, 2 * E, 2, F // 2)}
    trained = train_arms(job, runs)
    return Outcome(
        tuple(arm(of, name) for name, of in runs.items()),
        by_arm(figures(trained, _SHOWN) + _spread(trained), runs),
        _criteria(job, trained),
        (
            loss_chart(
                trained, "Validation loss", "One line per seed: other weights at the start, batches in other order."
            ),
        ),
        notes=(
            "One expert keeps its raw gate, as in Switch; the weights of two are divided by their sum, as in GShard.",
            "A spike is a step whose gradient norm is more than twice the median of the 20 steps before it.",
        ),
    )


def _spread(trained: Mapping[str, Sequence[Trained]]) -> tuple[Figure, ...]:
    shown = []
    for name, each in trained.items():
        if len(each) > 1:
            deviation = stdev(one.valid_loss for one in each)
            shown.append(Figure("standard deviation of the validation loss over seeds", name, (deviation,), digits=4))
        counts = tuple(float(spikes(one.grad_norms)) for one in each)
        shown.append(Figure("spikes of the gradient norm", name, counts, digits=0))
    return tuple(shown)


def _criteria(job: Job, trained: Mapping[str, Sequence[Trained]]) -> tuple[Criterion, ...]:
    loss = {name: [one.valid_loss for one in each] for name, each in trained.items()}
    found = (
        f"{mean(trained[_ONE], 'validation loss'):.3f} against {mean(trained[_TWO], 'validation loss'):.3f} nats/token"
    )
    if job.quick or len(job.seeds) < 2:
        chance = math.log(trained[_ONE][0].run.model.vocab_size)
        both = max(max(values) for values in loss.values())
        return (
            Criterion("both learn", f"{both:.2f} nats/token, a guess has {chance:.2f}", both < 0.9 * chance),
            Criterion("their spread: needs several seeds", found, None),
        )
    p = variance_test(loss[_ONE], loss[_TWO])
    one, two = (stdev(loss[name]) for name in (_ONE, _TWO))
    return (
        Criterion(
            f"one expert varies more over seeds than chance explains (F test, {_LEVEL:.0%})",
            f"standard deviation {one:.4f} against {two:.4f}, p = {p:.2f}",
            p < _LEVEL,
        ),
        Criterion(
            "one expert is as good as two, within twice the larger standard deviation",
            found,
            abs(mean(trained[_ONE], "validation loss") - mean(trained[_TWO], "validation loss")) <= 2 * max(one, two),
        ),
    )
