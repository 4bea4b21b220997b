"""Runs side by side: which configuration is better, by how much, how sure that is, and what each one cost."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from manyhands.compare.groups import Group, grouped
from manyhands.compare.interval import LEVEL, Difference, Floats, difference, mean_and_range
from manyhands.compare.run import BITS, NATS, Run, runs_in
from manyhands.compare.verdict import judge
from manyhands.errors import UserError

At = Literal["last", "best"]
SCHEMA = 1


@dataclass(frozen=True)
class Arm:
    """One configuration: what it reached, and how that is beside the first one's."""

    group: Group
    figures: tuple[float, ...]
    """Per seed."""
    beside_first: Difference | None
    """None for the first itself."""

    @property
    def mean(self) -> float:
        """Over seeds."""
        return mean_and_range(self.figures)[0]

    @property
    def cost(self) -> dict[str, float | None]:
        """Means over seeds; None where a run does not say."""
        costs = [run.cost for run in self.group.runs]
        known = {name: [cost[name] for cost in costs if cost[name] is not None] for name in costs[0]}
        return {name: math.fsum(v for v in values if v is not None) / len(values) if values else None
                for name, values in known.items()}  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """What `manyhands compare` found."""

    arms: tuple[Arm, ...]
    unit: str
    at: At
    documents: int | None
    """How many the losses are paired by; None where they were not kept."""
    notes: tuple[str, ...]
    """What a reader has to know beside the figures."""

    @property
    def verdicts(self) -> list[str]:
        """A sentence for each configuration but the first."""
        return [self._verdict(arm) for arm in self.arms[1:]]

    def _verdict(self, arm: Arm) -> str:
        found, first, ours = arm.beside_first, self.arms[0].group.letter, arm.group.letter
        assert found is not None
        if found.covers == "nothing":
            return (
                f"{ours} is {abs(found.value):.4f} {self.unit} {'below' if found.value < 0 else 'above'} {first}: how "
                "sure that is cannot be said of one seed each without losses by document"
            )
        digits = decimals(found.half)
        size, half = f"{abs(found.value):.{digits}f}", f"{found.half:.{digits}f}"
        seeds = _seeds(len(self.arms[0].figures), len(arm.figures))
        told = f"{self.unit} ({LEVEL:.0%} interval over {found.covers}; {seeds})"
        if found.shown:
            better, worse = (ours, first) if found.value < 0 else (first, ours)
            return f"{better} better than {worse} by {size} ± {half} {told}"
        return f"no difference shown between {ours} and {first}: {found.value:+.{digits}f} ± {half} {told}"

    def described(self) -> dict[str, Any]:
        """As JSON. Numbers that are not finite are null."""
        first = self.arms[0].group.letter
        return {
            "schema": SCHEMA,
            "unit": self.unit,
            "at": self.at,
            "level": LEVEL,
            "documents": self.documents,
            "configurations": [
                {
                    "letter": arm.group.letter,
                    "fields": dict(arm.group.fields),
                    "runs": [
                        {"path": run.name, "seed": run.seed, "figure": figure, "step": run.evals[-1]["step"],
                         "ended": run.ended, **run.cost}
                        for run, figure in zip(arm.group.runs, arm.figures, strict=True)
                    ],
                    "mean": arm.mean,
                    "cost": arm.cost,
                    "difference": None
                    if arm.beside_first is None
                    else {"from": first, "shown": arm.beside_first.shown, **_finite(asdict(arm.beside_first))},
                }
                for arm in self.arms
            ],
            "verdicts": self.verdicts,
            "notes": list(self.notes),
        }  # fmt: skip


def compare(paths: Sequence[Path], at: At = "last") -> Comparison:
    """Read the runs and compare every configuration with that of the first run.

    `at`: their last validation, or each one's best. Raises `UserError` for runs that say nothing of each other: other
    validation texts, other units; `DataError` for damaged files.
    """
    runs = [Run.open(path) for path in runs_in(list(paths))]
    if len(runs) < 2:
        raise UserError("compare: name two runs or more, or a folder of them")
    unit = _unit(runs)
    sums = [_by_document(run, at, unit) for run in runs]
    paired = _align(runs, sums)
    groups = grouped(runs)
    number = {id(run): index for index, run in enumerate(runs)}
    arms: list[Arm] = []
    size_X = None if paired is None else paired[0]
    for group in groups:
        figures = np.array([run.figure(at) for run in group.runs])
        nats_SX = None if paired is None else np.stack([paired[1][number[id(run)]] for run in group.runs])
        if not arms:
            first_S, first_SX = figures, nats_SX
        found = difference(first_S, figures, first_SX, nats_SX, size_X) if arms else None
        arms.append(Arm(group, tuple(figures.tolist()), found))
    return Comparison(
        tuple(arms), unit, at, None if size_X is None else len(size_X), tuple(_notes(runs, arms, paired is not None))
    )


def decimals(half: float) -> int:
    """Digits behind the point that leave two of an interval's."""
    return 3 if half <= 0 or not math.isfinite(half) else min(6, max(2, 1 - math.floor(math.log10(half))))


def _seeds(a: int, b: int) -> str:
    if a == b:
        return f"{a} seed{'s' if a > 1 else ' each'}" + (" each" if a > 1 else "")
    return f"{a} and {b} seeds"


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}


def _unit(runs: Sequence[Run]) -> str:
    units = {run.unit: run.name for run in reversed(runs)}
    if len(units) > 1:
        raise UserError(f"{units[BITS]} has {BITS} of a text, {units[NATS]} {NATS}: they cannot be compared")
    return next(iter(units))


def _by_document(run: Run, at: At, unit: str) -> Floats | None:
    losses = run.at(at)
    return None if losses is None else losses.nats_X / (1.0 if unit == NATS else math.log(2))


def _align(runs: Sequence[Run], sums: Sequence[Floats | None]) -> tuple[Floats, list[Floats]] | None:
    """Sizes [X] and each run's losses [X], document by document in one order; None where a run has not kept them.

    Raises `UserError` unless all were validated on the same text.
    """
    first = runs[0]
    orders = []
    for run in runs:
        if run.losses is None or first.losses is None:
            if not run.same_text(first):
                raise UserError(
                    f"{first.name} and {run.name}: whether they were validated on the same text is not known, so they "
                    "cannot be compared; train them again with the same data.valid, or use manyhands eval on one text"
                )
            continue
        keys = [row.tobytes() for row in run.losses.documents.sha256_X]
        orders.append(sorted(range(len(keys)), key=keys.__getitem__))
        known = [row.tobytes() for row in first.losses.documents.sha256_X]
        if sorted(keys) != sorted(known):
            common = len(set(keys) & set(known))
            raise UserError(
                f"{first.name} and {run.name} were validated on other texts ({len(known)} and {len(keys)} documents, "
                f"{common} of them in both), and what one was validated on the other may have been trained on: give "
                "both the same data.sources, data.seed and data.valid_fraction, or the same data.valid"
            )
    if any(values is None for values in sums) or len(orders) < len(runs):
        return None
    assert first.losses is not None
    size_X = first.losses.size_X[orders[0]].astype(np.float64)
    for run, order in zip(runs, orders, strict=True):
        assert run.losses is not None
        if not np.array_equal(run.losses.size_X[order], size_X):
            raise UserError(f"{first.name} and {run.name} count the validation text in other units")
    return size_X, [values[order] for values, order in zip(sums, orders, strict=True) if values is not None]


def _notes(runs: Sequence[Run], arms: Sequence[Arm], paired: bool) -> list[str]:
    notes = []
    if unfinished := [run.name for run in runs if not run.ended]:
        notes.append(f"not at their end, or stopped: {', '.join(unfinished)}; what they had reached is compared")
    if doubtful := [run.name for run in runs if judge(run.records, run.config).exit_code()]:
        notes.append(f"not worth keeping, by its verdict (its report.html says why): {', '.join(doubtful)}")
    if not paired:
        notes.append(
            "losses by document were not kept by all of these runs: intervals are over seeds alone, and hold for this "
            "validation text only"
        )
    if len(arms) > 1 and all(len(arm.figures) == 1 for arm in arms):
        notes.append(
            "one seed each: another seed of the same configuration would give another figure, and by how much is not "
            "known; train two or three of each (manyhands sweep)"
        )
    if any(arm.beside_first is not None and arm.beside_first.pooled for arm in arms):
        notes.append("a configuration with one seed is given the spread of the seeds of the other")
    if len(arms) > 2:
        notes.append(f"each interval holds by itself: of {len(arms) - 1} one in twenty is expected to miss, by chance")
    if any(not run.same_tokenizer(runs[0]) for run in runs) and runs[0].unit == BITS:
        notes.append("tokenizers differ: bits per byte are compared, losses and perplexities per token could not be")
    if looking := [
        arm.group.letter
        for arm in arms
        if (moe := arm.group.runs[0].config.model.moe) is not None and not moe.router.causal_safe
    ]:
        notes.append(f"the router of {', '.join(looking)} looks at other tokens: its loss flatters it")
    if len({(run.start.get("threads"), str(run.start.get("machine"))) for run in runs}) > 1:
        notes.append("not all ran on the same machine with as many threads: times say little")
    return notes
