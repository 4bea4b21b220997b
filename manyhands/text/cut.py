"""Rows in the room of a sequence: what is longer is cut, and what is left without a target is counted."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from manyhands.text.row import Row
from manyhands.text.targets import Example


@dataclass(slots=True)
class Cut:
    """What became of rows that are longer than `longest` tokens."""

    longest: int
    cut: int = 0
    """Texts in several pieces, and other rows without their ends."""
    lost: list[str] = field(default_factory=list)
    """Where rows are that are left out: no target lies before the cut, or what makes two answers different."""

    def fit(self, row: Row, examples: Sequence[Example]) -> list[Example]:
        """The examples of `row` in the room there is, or none of them.

        A text is cut into pieces that overlap by one token, so that no target of it is lost.
        """
        if all(len(example.ids) <= self.longest for example in examples):
            return list(examples)
        self.cut += 1
        if row.form == "text":
            starts = range(0, len(examples[0].ids) - 1, self.longest - 1)
            return [self._part(examples[0], start) for start in starts]
        parts = [self._part(example, 0) for example in examples]
        same = len(parts) == 2 and np.array_equal(parts[0].ids, parts[1].ids)
        if same or not all(part.learnt.any() for part in parts):
            self.lost.append(row.where)
            return []
        return parts

    def _part(self, example: Example, start: int) -> Example:
        """From `start` on; its first token is predicted by nothing."""
        part = slice(start, start + self.longest)
        learnt = example.learnt[part].copy()
        learnt[0] = False
        return Example(example.where, example.ids[part], learnt)
