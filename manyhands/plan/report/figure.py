"""A figure: a number with its unit, the formula it came from, and that formula with the numbers in it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from manyhands.format import show


@dataclass(frozen=True, slots=True)
class Formula:
    """A formula has one name, one expression and one source, wherever it is used."""

    name: str
    expression: str
    source: str


@dataclass(frozen=True, slots=True)
class Figure:
    """One result."""

    label: str
    value: float | None
    unit: str
    formula: Formula | None = None
    working: str = ""
    """The expression with the numbers in it."""
    note: str = ""
    key: str = ""
    """Its key in a table for programs, where it is not its column's: one key has one unit."""

    @property
    def shown(self) -> str:
        """For people."""
        return show(self.value, self.unit)

    def to_dict(self) -> dict[str, Any]:
        """For programs: full precision."""
        found: dict[str, Any] = {"label": self.label, "value": self.value, "unit": self.unit}
        if self.formula is not None:
            found |= {"formula": self.formula.name, "working": self.working}
        return found | ({"note": self.note} if self.note else {})


@dataclass(frozen=True, slots=True)
class Truth:
    """Yes or no: a boolean for programs, words for people."""

    value: bool
    shown: str


Cell = Figure | Truth | str


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells under column names; the first column labels the row."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    keys: tuple[str, ...] = ()
    """For programs, where a column's name would change with the machine, the models or the row."""

    def to_dict(self) -> list[dict[str, Any]]:
        """One object per row."""
        return [
            {
                (getattr(cell, "key", "") or name): cell.to_dict()
                if isinstance(cell, Figure)
                else cell.value
                if isinstance(cell, Truth)
                else cell
                for name, cell in zip(self.keys or self.columns, row, strict=True)
            }
            for row in self.rows
        ]


@dataclass(frozen=True, slots=True)
class Section:
    """A group of figures under one title."""

    key: str
    title: str
    figures: Sequence[Figure] = ()
    table: Table | None = None
    notes: Sequence[str] = field(default=())

    def all_figures(self) -> list[tuple[str, Figure]]:
        """(what it is called here, the figure), those of the table too."""
        found = [(figure.label, figure) for figure in self.figures]
        if self.table is not None:
            for row in self.table.rows:
                name = row[0] if isinstance(row[0], str) else row[0].shown
                cells = zip(self.table.columns[1:], row[1:], strict=True)
                found += [(f"{name}, {column}", cell) for column, cell in cells if isinstance(cell, Figure)]
        return found

    def to_dict(self) -> dict[str, Any]:
        """For programs."""
        found: dict[str, Any] = {"title": self.title, "figures": [figure.to_dict() for figure in self.figures]}
        if self.table is not None:
            found["table"] = self.table.to_dict()
        return found | ({"notes": list(self.notes)} if self.notes else {})
