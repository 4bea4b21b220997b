"""One sparse model, three ways to divide the tokens: learned, by a hash of the token id, by a frozen random router.

E experts, F their width.
"""

from collections.abc import Mapping, Sequence

from manyhands.lab.arms import by_arm, train_arms
from manyhands.lab.experiment import Criterion, Figure, Outcome
from manyhands.lab.figures import figures, loss_chart, mean
from manyhands.lab.job import Job
from manyhands.lab.language import Trained, arm, changed, match_dense, regime, with_experts

_DENSE, _LEARNED, _HASH, _FROZEN = "dense", "learned router", "hash of the token id", "frozen random router"
_SHOWN = ("validation loss", "validation", "MaxVio, worst layer", "dead experts, worst layer")


def run(job: Job) -> Outcome:
    """Train the four with each seed."""
    base = regime(job, 400, 30, "train.eval_every=" + ("15" if job.quick else "50"))
    E, F = (16, 32) if job.quick else (64, 128)
    learned = with_experts(base, E, 1, F)
    fixed = with_experts(base, E, 1, F, router="norm_top1: true")
    runs = {
        _DENSE: match_dense(learned),
        _LEARNED: learned,
        _HASH: with_experts(base, E, 1, F, router="select: hash"),
        _FROZEN: changed(fixed, 'trainable=["!layers.*.mlp.router.*"]'),
    }
    trained = train_arms(job, runs)
    return Outcome(
        tuple(arm(of, name, _note(name)) for name, of in runs.items()),
        by_arm(figures(trained, _SHOWN) + _gains(trained), runs),
        _criteria(job, trained),
        (loss_chart(trained, "Validation loss", "The same weights at the start but the router's, the same batches."),),
        notes=(
            "The learned router multiplies an expert's output by its gate, without which it would get no gradient; the "
            "two fixed ones give it weight 1. The frozen router's weights are those that every router begins with.",
            "A router that learns nothing still divides the tokens by what they are, so its experts specialise too. "
            "What the learned one is better by is what its own division is worth.",
        ),
    )


def _note(name: str) -> str:
    if name == _FROZEN:
        return "weights of the start, gate 1"
    return "" if name != _HASH else "gate 1; the router's weights are there but unused"


def _gains(trained: Mapping[str, Sequence[Trained]]) -> tuple[Figure, ...]:
    """What each way of dividing the tokens gains over the dense model, and how much of it needs no learning."""
    gain = {
        name: tuple(dense.valid_loss - one.valid_loss for dense, one in zip(trained[_DENSE], each, strict=True))
        for name, each in trained.items()
        if name != _DENSE
    }
    shown = [Figure("gain over the dense model", name, values, "nats/token") for name, values in gain.items()]
    if min(gain[_LEARNED]) > 0:
        for name in (_HASH, _FROZEN):
            share = tuple(100 * fixed / learned for fixed, learned in zip(gain[name], gain[_LEARNED], strict=True))
            shown.append(Figure("of the learned router's gain", name, share, "%", 0))
    return tuple(shown)


def _criteria(job: Job, trained: Mapping[str, Sequence[Trained]]) -> tuple[Criterion, ...]:
    loss = {name: mean(each, "validation loss") for name, each in trained.items()}
    if job.quick:
        sparse = [loss[name] for name in (_LEARNED, _HASH, _FROZEN)]
        first = trained[_DENSE][0].validation.losses[0]
        order = ", ".join(f"{each:.2f}" for each in sparse)
        return (
            Criterion("all of them learn", f"{first:.2f} → {max(sparse):.2f} nats/token", max(sparse) < first),
            Criterion("learned before hash before frozen: too small here to judge", order, None),
        )
    return tuple(
        Criterion(
            f"{better} before {worse}, with each seed",
            f"{loss[better]:.3f} against {loss[worse]:.3f} nats/token",
            all(a.valid_loss < b.valid_loss for a, b in zip(trained[better], trained[worse], strict=True)),
        )
        for better, worse in ((_LEARNED, _HASH), (_LEARNED, _FROZEN), (_HASH, _FROZEN))
    )
