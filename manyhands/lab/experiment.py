"""What an experiment asks, and what it found. Nothing here needs torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from manyhands.config import Strict

Text = Annotated[str, Field(min_length=1)]


class Description(Strict):
    """The `.toml` of an experiment: what is known before it runs."""

    question: Text
    """One line, for the list."""
    published: Text
    """What was measured elsewhere, with its figures."""
    source: Text
    """Where that stands."""
    different: Text
    """What is different here: size, data, steps."""
    claims: tuple[Annotated[int, Field(strict=True, ge=1)], ...]
    """Rows of `lab claims` that it answers."""
    seeds: Annotated[int, Field(strict=True, ge=1, le=1000)] = 1
    """How many, unless the user says."""
    minutes: Annotated[float, Field(gt=0.0, le=120.0)]
    """About how long on two cores."""
    data: str | None = None
    """What `--data` may name; None: it takes none."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One of the things compared."""

    name: str
    parameters: int | None = None
    active: int | None = None
    """Parameters that one token, or example, is multiplied by."""
    flops: float | None = None
    """Of a forward pass, per token or example."""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Figure:
    """A measured figure of an arm, one value per seed."""

    name: str
    arm: str
    """Empty: of the whole experiment."""
    values: tuple[float, ...]
    unit: str = ""
    digits: int = 3
    published: str = ""
    """The same figure as it was published, if it was."""
    beside: str = ""
    """What it is to be compared with: its null, a formula."""

    @property
    def mean(self) -> float:
        """Over seeds."""
        return math.fsum(self.values) / len(self.values) if self.values else math.nan

    @property
    def range(self) -> tuple[float, float]:
        """The least and the largest."""
        return (min(self.values), max(self.values)) if self.values else (math.nan, math.nan)


@dataclass(frozen=True, slots=True)
class Criterion:
    """Something that was to hold, stated before it was measured."""

    text: str
    found: str
    held: bool | None
    """None: could not be judged, a clock ratio on a busy machine for instance."""


@dataclass(frozen=True, slots=True)
class Curve:
    """A line of a chart."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    faint: bool = False
    """In the background: single seeds, a null."""


@dataclass(frozen=True, slots=True)
class Chart:
    """Curves for the page."""

    title: str
    x_label: str
    y_label: str
    curves: tuple[Curve, ...]
    about: str = ""
    """A sentence under the title: how to read it."""
    y_from_zero: bool = False


@dataclass(frozen=True, slots=True)
class Drawing:
    """Any other picture, as SVG."""

    title: str
    svg: str
    about: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What `run` of an experiment returns. Only the criteria of this size: with `job.quick`, the direction."""

    arms: tuple[Arm, ...]
    figures: tuple[Figure, ...]
    criteria: tuple[Criterion, ...]
    charts: tuple[Chart, ...] = ()
    drawings: tuple[Drawing, ...] = ()
    notes: tuple[str, ...] = ()
    """Sentences that a reader needs beside the figures."""

    @property
    def passed(self) -> bool:
        """No criterion failed."""
        return all(criterion.held is not False for criterion in self.criteria)

    @property
    def verdict(self) -> str:
        """reproduced, reproduced in part, or not reproduced; or not judged."""
        judged = [criterion.held for criterion in self.criteria if criterion.held is not None]
        if not judged:
            return "not judged"
        return "reproduced" if all(judged) else "reproduced in part" if any(judged) else "not reproduced"
