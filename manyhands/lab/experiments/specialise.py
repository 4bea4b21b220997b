"""Mutual information between a token's first expert and what the token is, beside random routers and shuffled experts.

E experts, K experts per token, F expert width.
"""

from collections.abc import Iterator
from math import isnan
from typing import Any

from manyhands.checkpoint import RunDirectory
from manyhands.checkpoint.model import load_model, only_decoder
from manyhands.config.decoder import as_decoder
from manyhands.inspect.compare import saturation
from manyhands.inspect.findings import measure
from manyhands.inspect.observed import Observed
from manyhands.inspect.resample import Figure as Measured
from manyhands.inspect.resample import Resampler
from manyhands.inspect.texts import Sequences
from manyhands.lab.experiment import Chart, Criterion, Curve, Figure, Outcome
from manyhands.lab.job import Job
from manyhands.lab.language import Trained, arm
from manyhands.lab.reading import check_data, look, trained_mixture, watch
from manyhands.models import Decoder, init_weights

_SEEN = (
    ("syntax", "bits", "I(expert; word class)", "bits"),
    ("syntax", "bits_given_token", "I(expert; word class | token id)", "bits"),
    ("vocabulary", "bits", "I(expert; token id)", "bits"),
    ("domains", "bits", "I(expert; domain)", "bits"),
    ("domains", "window", "sequences whose domain the load tells", ""),
)
"""What is shown of each layer: a group of `findings.measure`, a figure in it, its name and unit."""


def run(job: Job) -> Outcome:
    """A run per seed, looked at when it ends and at its checkpoints."""
    check_data(job, tagged=True)
    found: list[list[dict[str, Any]]] = []
    decided: list[Curve] = []
    trained = None
    for seed in job.seeds:
        trained = trained_mixture(job, seed, checkpoints=not job.quick)
        model, read = look(job, trained, seed)
        last = watch(model, read, seed)
        draws = 40 if job.quick else 100
        found.append(measure(last, draws, seed)["layers"])
        if not job.quick:
            decided.append(_over_training(trained, read, last, seed))
    assert trained is not None
    charts = [_beside_random(found)]
    if decided:
        charts.append(
            Chart(
                "How soon the router has decided",
                "optimiser step",
                "share of the K experts as at the end",
                tuple(decided),
                "Mean over tokens and layers; step 0 is the model before training, where K/E agree by chance.",
            )
        )
    note = "Bits are beyond what the same experts dealt to other tokens share with the labels. Beside them: routers of "
    note += "random direction on the same hidden states, equally busy. They too sort tokens by their identity."
    arms, figures = (arm(trained.run, "decoder"),), tuple(_figures(found))
    return Outcome(arms, figures, _criteria(found, job.quick), tuple(charts), notes=(note,))


def _over_training(trained: Trained, read: Sequences, last: Observed, seed: int) -> Curve:
    """Agreement of each checkpoint's routing, and of the untrained model's, with the last."""
    fresh = Decoder(as_decoder(trained.run.model)).eval()
    init_weights(fresh, seed)
    runs = [(0, watch(fresh, read, seed, 0))]
    for step, path in RunDirectory(trained.directory).checkpoints()[:-1]:
        runs.append((step, watch(only_decoder(load_model(path), "this experiment"), read, seed, 0)))
    runs.append((trained.run.train.max_steps, last))
    rows = saturation([(f"step {step}", seen) for step, seen in runs], Resampler(last, 2, seed=seed))
    shares = [sum(figure.value for figure in row["layers"]) / len(row["layers"]) for row in rows]
    return Curve(f"seed {seed}", [step for step, _ in runs], shares)


def _criteria(found: list[list[dict[str, Any]]], quick: bool) -> tuple[Criterion, ...]:
    """Of every seed, in the layer where it is least."""
    syntax: list[Measured] = [layer["syntax"]["bits"] for layers in found for layer in layers]
    ratios = [figure.value / max(figure.random, 1e-3) for figure in syntax]
    above = [figure.above_random is True for figure in syntax]
    context = [sum(_deviations(layer["syntax"]["bits_given_token"]) >= 10 for layer in layers) for layers in found]
    if quick:
        more = [figure.value > figure.random for figure in syntax]
        text = "experts know more of the word class than random routers in every layer"
        return (Criterion(text, f"in {sum(more)} of {len(more)}", all(more)),)
    criteria = [
        Criterion(
            "experts know the word class: twice a random router's information and more, intervals apart",
            f"{min(ratios):.1f} to {max(ratios):.1f} times over layers and seeds, {sum(above)} of {len(above)} apart",
            min(ratios) >= 2 and all(above),
        ),
        Criterion(
            "the context adds to what the token id says: 10 standard deviations above shuffling, in two layers or more",
            f"in {min(context)} layers",
            min(context) >= 2,
        ),
    ]
    windows = [layer["domains"]["window"].value for layers in found for layer in layers if "domains" in layer]
    if windows:
        text = "the load of a sequence tells its domain, three times in four"
        criteria.append(Criterion(text, f"{min(windows):.2f} at least", min(windows) >= 0.75))
    return tuple(criteria)


def _deviations(figure: Measured) -> float:
    return figure.value / figure.shuffled_sd if figure.shuffled_sd else float("inf")


def _figures(found: list[list[dict[str, Any]]]) -> Iterator[Figure]:
    for i, layer in enumerate(found[0]):
        for group, key, name, unit in _SEEN:
            if group in layer:
                every: list[Measured] = [layers[i][group][key] for layers in found]
                random = sum(each.random for each in every) / len(every)
                beside = "" if isnan(random) else f"random router {random:.3f}"
                yield Figure(name, f"layer {layer['layer']}", tuple(f.value for f in every), unit, beside=beside)


def _beside_random(found: list[list[dict[str, Any]]]) -> Chart:
    layers = [float(layer["layer"]) for layer in found[0]]

    def bits(what: str) -> list[float]:
        return [sum(getattr(f[i]["syntax"]["bits"], what) for f in found) / len(found) for i in range(len(layers))]

    curves = (Curve("the model", layers, bits("value")), Curve("random routers", layers, bits("random"), faint=True))
    return Chart("What an expert says of the word class", "layer", "bits", curves, y_from_zero=True)
