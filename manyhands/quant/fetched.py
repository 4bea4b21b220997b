"""The experts of one layer, packed, of which only some are in memory: a source brings the others while a step runs.

E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from manyhands.quant.record import Layout


class Source(Protocol):
    """Who brings records into memory.

    Both methods are called in the thread that runs the step, which holds no lock of the native library: they may
    block, and call it. What they raise ends the step, and is raised there.
    """

    def begin(self, layer: int, experts: Sequence[int]) -> None:
        """A step will want these, each once and in ascending order: begin to read what is missing.

        The table may be written, here and between steps; what it says when the experts' turn comes is used. Records
        of these experts stay where they are until that step has ended.
        """

    def wait(self, layer: int, expert: int) -> int:
        """The address of the record, on a boundary of 64 bytes, of an expert that was not in the table."""


@dataclass(frozen=True, slots=True, eq=False)
class FetchedExperts:
    """Where records are now, what is in them, and who brings the others."""

    table: Tensor
    """[E] int64: addresses of records, on boundaries of 64 bytes; 0: not in memory."""
    layout: Layout
    source: Source
    layer: int = 0
    """What the source calls the layer."""

    def same(self, other: "FetchedExperts | None") -> bool:
        """Whether it is the same table of the same source; what is in the table may have changed."""
        return (
            other is not None
            and self.table is other.table
            and self.layout == other.layout
            and self.source is other.source
        )
