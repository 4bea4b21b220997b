"""One sparse model, three ways to divide the tokens: learned, by a hash of the token id, by a frozen random router.

E experts, F their width.
"""

from collections.abc import Mapping, Sequence

from manyhands.lab.arms import by_arm, train_arms
from manyhands.lab.experiment import Criterion, Figure, Outcome
from manyhands.lab.figures import figures, loss_chart, mean
from manyhands.lab.job import Job
from manyhands.lab.language import Trained, arm, changed, match_dense, regime, with_experts

_DENSE, _TWO, _FROZEN = "dense", "learned, two per token", "frozen at random, two per token"
_ONE, _HASH = "learned, one per token", "hash of the token id, one per token"
_SHOWN = ("validation loss", "validation", "MaxVio, worst layer", "dead experts, worst layer")


def run(job: Job) -> Outcome:
    """Train the five with each seed."""
    base = regime(job, 300, 30, "train.eval_every=" + ("15" if job.quick else "50"))
    E, F = (16, 16) if job.quick else (64, 64)
    two = with_experts(base, E, 2, F)
    runs = {
        _DENSE: match_dense(two),
        _TWO: two,
        _FROZEN: changed(two, 'trainable=["!layers.*.mlp.router.*"]'),
        _ONE: with_experts(base, E // 2, 1, 2 * F),
        _HASH: with_experts(base, E // 2, 1, 2 * F, router="select: hash"),
    }
    trained = train_arms(job, runs)
    return Outcome(
        tuple(arm(of, name, _NOTES.get(name, "")) for name, of in runs.items()),
        by_arm(figures(trained, _SHOWN) + _gains(trained), runs),
        _criteria(job, trained),
        (loss_chart(trained, "Validation loss", "The same batches for all."),),
        notes=(
            "The frozen router differs from the learned one in nothing but that it is not trained. A hash sends a "
            "token to one expert, so a learned router of one per token stands beside it.",
            "With one per token the learned router multiplies the expert's output by its raw gate, without which it "
            "would get no gradient: at first that is near 1/E, and its experts say little. The hash has weight 1.",
            "A router that learns nothing still divides the tokens by what they are, so its experts specialise too. "
            "What the learned one is better by is what its own division is worth.",
        ),
    )


_NOTES = {_FROZEN: "its weights are those of the start", _HASH: "weight 1; the router's weights are unused"}


def _gains(trained: Mapping[str, Sequence[Trained]]) -> tuple[Figure, ...]:
    """What each way of dividing the tokens gains over the dense model, and how much of it needs no learning."""
    gain = {
        name: tuple(dense.valid_loss - one.valid_loss for dense, one in zip(trained[_DENSE], each, strict=True))
        for name, each in trained.items()
        if name != _DENSE
    }
    shown = [Figure("gain over the dense model", name, values, "nats/token") for name, values in gain.items()]
    for fixed, learned in ((_FROZEN, _TWO), (_HASH, _ONE)):
        if min(gain[learned]) > 0:
            share = tuple(100 * f / of for f, of in zip(gain[fixed], gain[learned], strict=True))
            shown.append(Figure("as a share of the learned router's", fixed, share, "%", 0))
    return tuple(shown)


def _criteria(job: Job, trained: Mapping[str, Sequence[Trained]]) -> tuple[Criterion, ...]:
    loss = {name: mean(each, "validation loss") for name, each in trained.items()}
    if job.quick:
        sparse = max(loss[name] for name in (_TWO, _FROZEN, _ONE, _HASH))
        first = trained[_DENSE][0].validation.losses[0]
        order = f"{loss[_TWO]:.2f}, {loss[_FROZEN]:.2f}"
        return (
            Criterion("all of them learn", f"{first:.2f} → {sparse:.2f} nats/token", sparse < first),
            Criterion("learned before frozen: too small here to judge", order, None),
        )
    return tuple(
        Criterion(
            f"{better} before {worse}, with each seed",
            f"{loss[better]:.3f} against {loss[worse]:.3f} nats/token",
            all(a.valid_loss < b.valid_loss for a, b in zip(trained[better], trained[worse], strict=True)),
        )
        for better, worse in ((_TWO, _FROZEN), (_ONE, _HASH), (_HASH, _FROZEN))
    )
