"""A layout of processes against one process: three steps of training on a mesh, everything compared.

Every process trains the same small model twice, by itself on all rows of each batch, and with the others on its own
rows. All is float64 but the routers, which are float32 by rule: what differs is one rounding of 2⁻²⁴ and what an
optimiser makes of it. The rows of a batch have different numbers of targets, the first process none.

W processes, `dp` × `ep`; B rows, S tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from manyhands.check.compare import Tolerance, close, exact
from manyhands.check.report import Row, Situation
from manyhands.config import BalanceConfig, BuiltConfig, EncoderDecoderConfig, OptimConfig, RunConfig, TrainConfig
from manyhands.config.parallel import ParallelConfig
from manyhands.models import AnyModel, LanguageModel, build, init_weights
from manyhands.parallel.group import Group, mesh_of
from manyhands.parallel.ranks import Alone, Ranks, largest_of
from manyhands.parallel.shards import whole
from manyhands.text import PairBatch, pad_pairs
from manyhands.train.guard import SpikeGuard
from manyhands.train.layout import build_on
from manyhands.train.optim import build_optimizers
from manyhands.train.qk_clip import clips
from manyhands.train.seq2seq import SpanCorruption
from manyhands.train.step import StepResult, train_step
from manyhands.train.task import Count, Forward, LanguageModelling, Loss, Task, next_token_loss

_BIAS = "e_score_correction_bias"
STEPS = 3
ROWS_EACH = 2  # of a batch, on each process
LIMIT = Tolerance(error=1e-6, floor=1e-3, by_norm=False, cosine=1.0 - 1e-9, slack=0.0)
CLIP, QK_CLIP = 0.05, 0.02  # so low that both are at work in every step
RATE, EPS = 1e-4, 1e-3  # so that an optimiser does not blow up the routers' rounding: it divides by what it is given


@dataclass(frozen=True, slots=True)
class Way:
    """How a layout is trained once."""

    optimizer: str
    dispatch: str
    recompute: bool
    micro: int | None

    @property
    def name(self) -> str:
        """For the report."""
        parts = [self.optimizer, self.dispatch, "recompute" * self.recompute, "accumulate" * (self.micro is not None)]
        return ", ".join(filter(None, parts))


WAYS = (Way("muon", "by_pairs", False, None), Way("adamw", "by_tokens", True, 1))


@dataclass(frozen=True, slots=True)
class Masked:
    """Token ids [B, S + 1], and what of it is a target [B, S]."""

    ids: Tensor
    targets: Tensor


class Uneven(LanguageModelling):
    """The next token, where there is a target."""

    def split(self, batch: Masked, size: int | None) -> list[Masked]:  # type: ignore[override]
        """Rows of it."""
        size = size or len(batch.ids)
        return [Masked(*part) for part in zip(*(torch.split(x, size) for x in (batch.ids, batch.targets)), strict=True)]

    def count(self, micro: Masked) -> Count:  # type: ignore[override]
        """Every token is read."""
        return Count(len(micro.ids), micro.targets.numel(), int(micro.targets.sum()))

    def loss(self, model: LanguageModel, micro: Masked, how: Forward) -> Loss:  # type: ignore[override]
        """Cross entropy."""
        return next_token_loss(model, micro.ids, micro.targets, how)


@dataclass(slots=True)
class Trained:
    """What three steps gave."""

    results: list[StepResult]
    gradients: dict[str, Tensor]
    """Whole, of each step, before they were clipped."""
    weights: dict[str, Tensor]
    """Whole, after the last step."""


def layout_rows(
    config: BuiltConfig,
    balance: BalanceConfig,
    length: int,
    ranks: Group,
    ep: int,
    seed: int,
    ways: Sequence[Way] = WAYS,
) -> Iterator[Row]:
    """Every comparison of one layout, on sequences of `length`; the same on every process. Collective.

    Raises `ConfigError` for what several processes cannot train as one.
    """
    name = f"{ranks.size // ep}x{ep}"
    for way in ways:
        run = _run(config, balance, length, ranks.size, ep, way, seed)
        at = Situation("layout", name, "eager", "float64", way.name)
        yield from _rows(at, run, ranks, ep, noisy(config))


def noisy(config: BuiltConfig) -> bool:
    """Whether training draws random numbers, which every process does for itself."""
    if getattr(config, "dropout", 0.0):
        return True
    if (moe := config.moe) is None:
        return False
    router = moe.router
    return bool(
        moe.input_jitter or router.noisy or router.jitter or router.random_second or router.select == "sparsemixer"
    )


def _run(
    config: BuiltConfig, balance: BalanceConfig, length: int, size: int, ep: int, way: Way, seed: int
) -> RunConfig:
    batch = size * ROWS_EACH
    muon = way.optimizer == "muon"
    return RunConfig(
        model=config,
        balance=balance,
        optim=OptimConfig(
            name=way.optimizer,  # type: ignore[arg-type]
            grad_clip=CLIP,
            eps=EPS,
            qk_clip=QK_CLIP if muon and clips(config) else None,
        ),
        train=TrainConfig(
            seed=seed,
            batch_size=batch,
            micro_batch_size=way.micro,
            sequence_length=length,
            recompute=way.recompute,
            dtype="float32",
            experts_implementation="eager",
        ),
        parallel=ParallelConfig(ep=ep, dispatch=way.dispatch),  # type: ignore[arg-type]
    )


def _rows(at: Situation, run: RunConfig, ranks: Group, ep: int, quiet: bool) -> Iterator[Row]:
    mesh = mesh_of(ranks, ep)
    assert mesh is not None
    one = build(run.model, "eager")
    init_weights(one, run.train.seed)
    many = build_on(run, mesh, torch.device("cpu"))
    fresh = {name: whole(value) for name, value in many.state_dict().items()}
    yield exact(at, "fresh weights", fresh, dict(one.state_dict()))
    micro = None if run.train.micro_batch_size is None else run.train.micro_batch_size * ranks.size
    alone = run.model_copy(update={"train": run.train.model_copy(update={"micro_batch_size": micro})})
    for model in (one, many):
        model.double().train(not quiet)
    right, found = _train(one, alone, Alone(), ranks), _train(many, run, ranks, ranks)
    yield from _compared(at, found, right)
    yield _agreed(at, found, ranks)


def _train(model: AnyModel, run: RunConfig, ranks: Ranks, every: Ranks) -> Trained:
    """Of each batch all rows, in the order in which `every` process sees them, or the own ones."""
    task: Task = SpanCorruption() if isinstance(run.model, EncoderDecoderConfig) else Uneven()
    optimizers, guard = build_optimizers(model, run.optim), SpikeGuard(run.guard)
    results, gradients = list[StepResult](), dict[str, Tensor]()
    for step in range(1, STEPS + 1):
        order = torch.arange(run.train.batch_size).view(every.size, -1)
        rows = order.t().flatten() if ranks.size == 1 else order[ranks.rank]
        batch = _batch(run, step, rows)
        how = (run, step, RATE, torch.float64, task, ranks)
        results.append(train_step(model, optimizers, guard, batch, *how))
        clipped = min(1.0, CLIP / (results[-1].grad_norm + 1e-6))
        for name, p in model.named_parameters():
            if p.grad is not None:
                gradients[f"{name}, step {step}"] = whole(p.grad) / clipped
    return Trained(results, gradients, {name: whole(value) for name, value in model.state_dict().items()})


def _batch(run: RunConfig, step: int, rows: Tensor) -> Masked | PairBatch:
    """Those rows of the step's batch. The first two have no target, the last ones nearly nothing else."""
    generator = torch.Generator().manual_seed(1000 * run.train.seed % (1 << 32) + step)
    B, S, vocab = run.train.batch_size, run.train.sequence_length, run.model.vocab_size
    ids = torch.randint(0, vocab, (B, S + 1), generator=generator)
    likely = torch.linspace(0.0, 0.95, B)[:, None] * (torch.arange(B) >= ROWS_EACH)[:, None]
    targets = torch.rand(B, S, generator=generator) < likely
    if not isinstance(run.model, EncoderDecoderConfig):
        return Masked(ids[rows], targets[rows])
    lengths = 1 + targets.sum(1)
    pairs = [(row[: S // 2 + n].tolist(), row[:n].tolist()) for row, n in zip(ids, lengths.tolist(), strict=True)]
    return pad_pairs([pairs[row] for row in rows.tolist()])


def _compared(at: Situation, found: Trained, right: Trained) -> Iterator[Row]:
    def numbers(of: Trained, what: str) -> dict[str, Tensor]:
        return {f"step {n}": torch.tensor(getattr(r, what), dtype=torch.float64) for n, r in enumerate(of.results, 1)}

    for quantity, what in (("loss", "loss"), ("gradient norm", "grad_norm")):
        yield _close(at, quantity, numbers(found, what), numbers(right, what))
    for term in right.results[0].terms:
        terms = [
            {
                f"{term}, step {n}": torch.tensor(r.terms.get(term, float("nan")), dtype=torch.float64)
                for n, r in enumerate(of.results, 1)
            }
            for of in (found, right)
        ]
        yield _close(at, "balance terms", *terms)
    counts = [
        {f"step {n}, layer {k}": c.counts for n, r in enumerate(of.results, 1) for k, c in r.counters.items()}
        for of in (found, right)
    ]
    if counts[1]:
        yield exact(at, "counts of experts", *counts)
    for kind in ("experts", "routers", "all else"):
        if of_kind := _of_kind(kind, right.gradients):
            yield _close(at, f"gradients of {kind}", _of_kind(kind, found.gradients), of_kind)
    if steered := {name: bias for name, bias in right.weights.items() if name.endswith(_BIAS)}:
        yield exact(at, "bias", {name: found.weights[name] for name in steered}, steered)
    moved = {name: weight for name, weight in right.weights.items() if not name.endswith(_BIAS)}
    yield _close(at, f"weights after {STEPS} steps", {name: found.weights[name] for name in moved}, moved)


def _of_kind(kind: str, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    def kind_of(name: str) -> str:
        return "routers" if ".router." in name else "experts" if ".experts." in name else "all else"

    return {name: tensor for name, tensor in named.items() if kind_of(name) == kind}


def _close(at: Situation, quantity: str, found: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> Row:
    return close(at, quantity, found, right, tolerance=LIMIT)


def _agreed(at: Situation, found: Trained, ranks: Ranks) -> Row:
    """What decides is the same on every process, bit for bit."""
    numbers = [x for r in found.results for x in (r.loss, r.grad_norm, *r.terms.values(), float(r.skipped))]
    high, low = largest_of(numbers, ranks), [-x for x in largest_of([-x for x in numbers], ranks)]
    name = "loss, norm and terms"
    both = ({name: torch.tensor(side, dtype=torch.float64)} for side in (high, low))
    return exact(at, "alike on every process", *both)
