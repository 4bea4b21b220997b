"""The catalogue counted: how many systems of a year are sparse, and how many experts their tokens visit.

It is a choice of well-known systems, not a census: the counts say what was published, not how much each is used.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from manyhands.catalog.entry import Entry


@dataclass(frozen=True, slots=True)
class Year:
    """The systems of the catalogue that were released in one year."""

    year: int
    sparse: int
    dense: int
    not_disclosed: int
    """Systems whose makers do not say which."""
    experts_per_token: dict[int, int] = field(default_factory=dict)
    """Experts per token, shared ones aside → how many sparse systems, where that is published; in ascending order."""

    @property
    def systems(self) -> int:
        """All of them."""
        return self.sparse + self.dense + self.not_disclosed


def by_year(entries: Iterable[Entry]) -> list[Year]:
    """One `Year` for each that has a system, the first year first."""
    years: dict[int, list[Entry]] = {}
    for entry in entries:
        years.setdefault(entry.year, []).append(entry)
    return [_year(year, found) for year, found in sorted(years.items())]


def _year(year: int, entries: list[Entry]) -> Year:
    kinds = Counter(entry.sparse for entry in entries)
    visited = Counter(entry.mixture.experts_per_token for entry in entries if entry.sparse and entry.mixture)
    return Year(year, kinds[True], kinds[False], kinds[None], dict(sorted(visited.items())))
