"""As many experts and as many per token, all routed or one of them shared: loss, specialisation, what each is worth.

E experts, F their width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np

from manyhands.generate.evaluate import evaluate
from manyhands.inspect.ablate import ablate
from manyhands.inspect.resample import Figure as Measured
from manyhands.inspect.resample import Resampler
from manyhands.inspect.specialise import syntax, vocabulary
from manyhands.lab.arms import by_arm, train_arms
from manyhands.lab.experiment import Criterion, Figure, Outcome
from manyhands.lab.figures import figures, loss_chart, mean
from manyhands.lab.job import Job
from manyhands.lab.language import Trained, arm, regime, with_experts
from manyhands.lab.reading import CLASSES, look, watch
from manyhands.models import Decoder

_ROUTED, _SHARED = "all routed", "one of them shared"
_SHOWN = ("validation loss", "validation", "MaxVio, worst layer")


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a trained model shows, means over layers."""

    of_class: Measured
    of_id: Measured
    without_shared: float
    """Rise of the loss with a layer's shared expert off, nats per token; 0 if it has none."""
    without_busiest: float
    """The same with the layer's busiest routed expert off: its tokens go to their next choices."""


def run(job: Job) -> Outcome:
    """Train both with each seed, then look at the routing of text that they were not trained on."""
    base = regime(job, 400, 30, "train.eval_every=" + ("15" if job.quick else "50"))
    E, F = (16, 16) if job.quick else (64, 48)
    runs = {
        _ROUTED: with_experts(base, E, 3, F),
        _SHARED: with_experts(base, E - 1, 2, F, more="n_shared_experts: 1"),
    }
    trained = train_arms(job, runs)
    seen = {name: [_look(job, one, number) for number, one in enumerate(each)] for name, each in trained.items()}
    return Outcome(
        tuple(arm(of, name) for name, of in runs.items()),
        by_arm(figures(trained, _SHOWN) + _shown(seen), runs),
        _criteria(job, trained, seen),
        (loss_chart(trained, "Validation loss", "One line per seed."),),
        notes=(
            "Information is about a token's first routed expert, mean over layers, beyond what the same experts dealt "
            f"to other tokens have; on code and prose that were not trained on. Classes of code: {', '.join(CLASSES)}.",
        ),
    )


def _look(job: Job, trained: Trained, seed: int) -> _Seen:
    model, read = look(replace(job, data=None), trained, seed)
    seen = watch(model, read, seed)
    sampled = Resampler(seen, draws=2, seed=seed)
    layers = range(len(seen.layers))
    [(ids_BS1, _)] = trained.valid_batches(1)
    busiest = [(n, int(np.bincount(seen.expert_ids[:, i].ravel()).argmax())) for i, n in enumerate(seen.layers)]
    off = ablate(model, ids_BS1, experts=busiest, batch_size=len(ids_BS1), draws=2).experts
    return _Seen(
        of_class=_mean([syntax(seen, i, sampled)["bits"] for i in layers]),
        of_id=_mean([vocabulary(seen, i, sampled)["bits"] for i in layers]),
        without_shared=_without_shared(model, trained),
        without_busiest=fmean(each.increase for each in off),
    )


def _mean(layers: Sequence[Measured]) -> Measured:
    return Measured(fmean(layer.value for layer in layers), random=fmean(layer.random for layer in layers))


def _without_shared(model: Decoder, trained: Trained) -> float:
    """Mean over layers of the rise of the loss when that layer's shared expert says nothing."""
    whole, rises = evaluate(model, trained.valid_batches(1)).loss, []
    for mlp in model.sparse_layers().values():
        shared, mlp.shared_experts = mlp.shared_experts, None
        rises.append(evaluate(model, trained.valid_batches(1)).loss - whole)
        mlp.shared_experts = shared
    return fmean(rises)


def _shown(seen: Mapping[str, Sequence[_Seen]]) -> tuple[Figure, ...]:
    shown = []
    for name, each in seen.items():
        for label, found in (("class", [one.of_class for one in each]), ("id", [one.of_id for one in each])):
            beside = f"random router {fmean(one.random for one in found):.3f}"
            values = tuple(one.value for one in found)
            shown.append(Figure(f"I(expert; {label} of the token)", name, values, "bits", beside=beside))
        off = {"busiest routed": tuple(one.without_busiest for one in each)}
        if name == _SHARED:
            off["shared"] = tuple(one.without_shared for one in each)
        for which, values in off.items():
            shown.append(Figure(f"loss without a layer's {which} expert: rise", name, values, "nats/token"))
    return tuple(shown)


def _criteria(
    job: Job, trained: Mapping[str, Sequence[Trained]], seen: Mapping[str, Sequence[_Seen]]
) -> tuple[Criterion, ...]:
    shared, busiest = (fmean(getattr(one, of) for one in seen[_SHARED]) for of in ("without_shared", "without_busiest"))
    missed = Criterion(
        "the shared expert is missed more than the busiest routed one",
        f"{shared:+.3f} against {busiest:+.3f} nats/token",
        all(one.without_shared > one.without_busiest for one in seen[_SHARED]),
    )
    if job.quick:
        first = max(each[0].validation.losses[0] for each in trained.values())
        last = max(mean(each, "validation loss") for each in trained.values())
        return (
            Criterion("both learn", f"{first:.2f} → {last:.2f} nats/token", last < first),
            replace(missed, text=f"{missed.text}: too small here to judge", held=None),
        )
    bits = {name: [one.of_class.value for one in each] for name, each in seen.items()}
    return (
        Criterion(
            "a shared expert lowers the loss, with each seed",
            f"{mean(trained[_SHARED], 'validation loss'):.3f} against {mean(trained[_ROUTED], 'validation loss'):.3f}",
            all(a.valid_loss < b.valid_loss for a, b in zip(trained[_SHARED], trained[_ROUTED], strict=True)),
        ),
        Criterion(
            "the routed experts know more of the token's class beside it, with each seed",
            f"{fmean(bits[_SHARED]):.3f} against {fmean(bits[_ROUTED]):.3f} bits",
            all(a > b for a, b in zip(bits[_SHARED], bits[_ROUTED], strict=True)),
        ),
        missed,
    )
