"""Train and validation loss of a dense model and a mixture of equal active FLOPs, tuned on few and on many examples."""

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics

import torch
from torch import Tensor

from manyhands.checkpoint.model import load, only_decoder
from manyhands.config import RunConfig
from manyhands.lab.experiment import Chart, Criterion, Curve, Figure, Outcome
from manyhands.lab.job import Job
from manyhands.lab.language import arm, changed, match_dense, regime, train_arm, with_experts
from manyhands.lab.learn import Asked, ask, learn
from manyhands.models import Decoder
from manyhands.text import Tokenizer

_BATCH = 20
_LOOKS = 8
_LEFT_OUT = {"pydoc_data", "test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True, slots=True)
class Tuned:
    """A tuning on few examples."""

    steps: list[int]
    train: list[float]
    """Nats per token on examples that are trained on."""
    valid: list[float]

    @property
    def gap(self) -> float:
        """At the end."""
        return self.valid[-1] - self.train[-1]


def run(job: Job) -> Outcome:
    """Two models a seed, trained on code and tuned on prose twice."""
    sizes = (20, 80) if job.quick else (100, 1200)
    base = regime(job, 500, 40, *([] if job.quick else [f"data.sources={code()}"]))
    sparse = with_experts(base, *((8, 2, 32) if job.quick else (64, 2, 64)))
    runs = {"dense": match_dense(sparse), "sparse": sparse}
    found: dict[tuple[str, int], list[Tuned]] = {}
    for seed in job.seeds:
        for name, each in runs.items():
            trained = train_arm(job, changed(each, f"train.seed={seed}"), f"{name}-{seed}")
            for size in sizes:
                loaded, tokenizer = load(trained.directory)
                model = only_decoder(loaded, "this experiment")
                assert tokenizer is not None
                ids = prose(tokenizer, each.train.sequence_length, seed)
                tuned = tuned_on(job, each, model, ids, size, seed, f"{name}, {size} examples")
                found.setdefault((name, size), []).append(tuned)
    few, many = sizes

    def gap(name: str, size: int) -> float:
        return sum(each.gap for each in found[name, size]) / len(job.seeds)

    if job.quick:
        text = f"both over-fit more on {few} examples than on {many}"
        gaps = [(gap(name, few), gap(name, many)) for name in runs]
        shown = " and ".join(f"{a:.2f} against {b:.2f} nats" for a, b in gaps)
        criteria = [Criterion(text, shown, all(a > b for a, b in gaps))]
    else:
        apart = {size: gap("sparse", size) - gap("dense", size) for size in sizes}
        best = {name: sum(min(t.valid) for t in found[name, many]) / len(job.seeds) for name in runs}
        criteria = [
            Criterion(
                f"on {few} examples the mixture's validation loss lies further above its training loss",
                f"{gap('sparse', few):.3f} against {gap('dense', few):.3f} nats",
                apart[few] > 0,
            ),
            Criterion(
                f"on {many} the difference is smaller",
                f"{apart[many]:.3f} against {apart[few]:.3f} nats",
                apart[many] < apart[few],
            ),
            Criterion(
                f"on {many} the mixture's best validation loss is the lower one",
                f"{best['sparse']:.3f} against {best['dense']:.3f} nats",
                best["sparse"] < best["dense"],
            ),
        ]
    figures = []
    for (name, size), every in found.items():
        label = f"{name}, {size} examples"
        figures += [
            Figure("training loss at the end", label, tuple(t.train[-1] for t in every), "nats"),
            Figure("validation loss at the end", label, tuple(t.valid[-1] for t in every), "nats"),
            Figure("validation loss at its best", label, tuple(min(t.valid) for t in every), "nats"),
            Figure("gap at the end", label, tuple(t.gap for t in every), "nats"),
        ]
    charts = tuple(_chart(size, {name: found[name, size][0] for name in runs}) for size in sizes)
    arms = tuple(arm(each, name) for name, each in runs.items())
    return Outcome(arms, tuple(figures), tuple(criteria), charts)


def tuned_on(job: Job, run: RunConfig, model: Decoder, ids: Tensor, size: int, seed: int, name: str) -> Tuned:
    """Tuned on `size` sequences of `ids` behind those that are held out: what of the model requires a gradient.

    In equal stretches of steps, looked at after each.
    """
    held = 40 if job.quick else 300
    valid, examples = ids[:held], ids[held : held + size]
    steps = 32 if job.quick else 320
    run = changed(
        run, f"train.max_steps={steps // _LOOKS}", "optim.name=adamw", "optim.lr=0.001", "schedule.warmup_steps=0"
    )
    order = _shuffled(examples, seed)
    tuned = Tuned([], [], [])
    for look in range(_LOOKS + 1):
        if look:
            learn(job, run, order, name, model)
        tuned.steps.append(look * (steps // _LOOKS))
        tuned.train.append(ask(model, _asked(examples[:held])).nats)
        tuned.valid.append(ask(model, _asked(valid)).nats)
    return tuned


def _shuffled(examples: Tensor, seed: int) -> Iterator[Asked]:
    """Epoch after epoch."""
    draw = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.split(torch.randperm(len(examples), generator=draw), _BATCH):
            yield _asked(examples[rows])


def _asked(ids_BS: Tensor) -> Asked:
    """Every next token."""
    targets = ids_BS[:, 1:]
    return Asked(ids_BS[:, :-1].contiguous(), targets, torch.ones_like(targets, dtype=torch.bool))


def prose(tokenizer: Tokenizer, length: int, seed: int) -> Tensor:
    """[N, length + 1]: sequences of the language reference, in random order."""
    ids = [i for text in topics.topics.values() for i in tokenizer.encode(text)]
    whole = torch.tensor(ids[: len(ids) // (length + 1) * (length + 1)]).view(-1, length + 1)
    return whole[torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))]


def code() -> list[str]:
    """The standard library without `prose`."""
    library = Path(sysconfig.get_paths()["stdlib"])
    return [
        str(path)
        for path in sorted(library.iterdir())
        if path.suffix == ".py" or (path.name not in _LEFT_OUT and path.is_dir() and any(path.rglob("*.py")))
    ]


def _chart(size: int, tuned: dict[str, Tuned]) -> Chart:
    curves = []
    for name, each in tuned.items():
        curves.append(Curve(f"{name}, validation", each.steps, each.valid))
        curves.append(Curve(f"{name}, training", each.steps, each.train, faint=True))
    return Chart(f"Tuned on {size} examples", "step", "nats per token", tuple(curves), "The first seed.")
