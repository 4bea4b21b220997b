"""Train and validation loss of a mixture tuned on few examples: all of it, its experts, the rest, with dropout."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from manyhands.checkpoint.model import load, only_decoder
from manyhands.lab.experiment import Chart, Criterion, Curve, Figure, Outcome
from manyhands.lab.experiments.fine_tune import Tuned, code, prose, tuned_on
from manyhands.lab.job import Job
from manyhands.lab.language import arm, changed, regime, train_arm, with_experts
from manyhands.models import Decoder
from manyhands.train.trainable import chosen

_ARMS: dict[str, tuple[str, ...]] = {
    "all": ("*",),
    "all, dropout in the experts": ("*",),
    "experts alone": ("*.mlp.experts.*",),
    "all but the experts": ("!*.mlp.experts.*",),
    "all but the routers": ("!*.mlp.router.*",),
}
"""What is tuned, as patterns over the names of parameters."""
_DROPOUT = 0.4


def run(job: Job) -> Outcome:
    """One mixture a seed, trained on code and tuned on prose in five ways."""
    size = 20 if job.quick else 100
    base = regime(job, 500, 40, *([] if job.quick else [f"data.sources={code()}"]))
    each = with_experts(base, *((8, 2, 32) if job.quick else (64, 2, 64)))
    found: dict[str, list[Tuned]] = {name: [] for name in _ARMS}
    shares: dict[str, float] = {}
    for seed in job.seeds:
        trained = train_arm(job, changed(each, f"train.seed={seed}"), f"sparse-{seed}")
        for name, patterns in _ARMS.items():
            loaded, tokenizer = load(trained.directory)
            model = only_decoder(loaded, "this experiment")
            assert tokenizer is not None
            shares[name] = _train_only(model, patterns)
            ids = prose(tokenizer, each.train.sequence_length, seed)
            with _dropout(model, _DROPOUT if "dropout" in name else 0.0):
                found[name].append(tuned_on(job, each, model, ids, size, seed, f"{name}, seed {seed}"))

    def best(name: str) -> float:
        return sum(min(tuned.valid) for tuned in found[name]) / len(job.seeds)

    def gap(name: str) -> float:
        return sum(tuned.gap for tuned in found[name]) / len(job.seeds)

    rest, alone = "all but the experts", "experts alone"
    fewer = Criterion(
        "tuned without its experts, validation lies less far above training loss than with all",
        f"{gap(rest):.3f} against {gap('all'):.3f} nats",
        gap(rest) < gap("all"),
    )
    criteria = [fewer]
    if not job.quick:
        criteria += [
            Criterion(
                "without its experts the best validation loss is within 0.05 nats of that with all, or lower",
                f"{best(rest):.3f} against {best('all'):.3f} nats",
                best(rest) < best("all") + 0.05,
            ),
            Criterion(
                "the experts alone end with a higher best validation loss than the rest alone",
                f"{best(alone):.3f} against {best(rest):.3f} nats",
                best(alone) > best(rest),
            ),
            Criterion(
                "dropout in the experts lowers the best validation loss",
                f"{best('all, dropout in the experts'):.3f} against {best('all'):.3f} nats",
                best("all, dropout in the experts") < best("all"),
            ),
        ]
    arms = tuple(arm(each, name, f"{shares[name]:.0%} of the parameters are tuned") for name in _ARMS)
    chart = _chart(size, {name: tuned[0] for name, tuned in found.items()})
    return Outcome(arms, tuple(_figures(found)), tuple(criteria), (chart,))


def _train_only(model: Decoder, patterns: tuple[str, ...]) -> float:
    """Share of the parameters that are trained from here on."""
    parameters = dict(model.named_parameters())
    taken = chosen(parameters, patterns)
    for name, p in parameters.items():
        p.requires_grad_(name in taken)
    return sum(parameters[name].numel() for name in taken) / sum(p.numel() for p in parameters.values())


@contextmanager
def _dropout(model: Decoder, rate: float) -> Iterator[None]:
    """While training, of what a token's experts say together."""

    def drop(module: nn.Module, _: Any, y: Tensor) -> Tensor:
        return F.dropout(y, rate, module.training)

    layers = model.sparse_layers().values() if rate else ()
    handles = [layer.experts.register_forward_hook(drop) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _figures(found: dict[str, list[Tuned]]) -> Iterable[Figure]:
    for name, every in found.items():
        yield Figure("training loss at the end", name, tuple(t.train[-1] for t in every), "nats")
        yield Figure("validation loss at the end", name, tuple(t.valid[-1] for t in every), "nats")
        yield Figure("validation loss at its best", name, tuple(min(t.valid) for t in every), "nats")
        yield Figure("gap at the end", name, tuple(t.gap for t in every), "nats")


def _chart(size: int, tuned: dict[str, Tuned]) -> Chart:
    curves = tuple(Curve(name, each.steps, each.valid) for name, each in tuned.items())
    return Chart(f"Validation loss, tuned on {size} examples", "step", "nats per token", curves, "The first seed.")
