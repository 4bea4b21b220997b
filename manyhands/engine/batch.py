"""What one forward pass runs: the next tokens of some sequences, one behind the other, without padding.

T tokens of R rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from manyhands.layers.cache import Cache


@dataclass(slots=True)
class Row:
    """The next tokens of one sequence."""

    ids: list[int]
    cache: Cache
    """What was computed of its earlier tokens; the pass extends it."""
    draws: bool = True
    """Whether a token is to be drawn after the last of these: where a prompt is run in chunks, only after the last."""

    @property
    def position(self) -> int:
        """Of the first of them in the sequence, while they have not run."""
        return self.cache.length

    @property
    def length(self) -> int:
        """Of the sequence when they have."""
        return self.position + len(self.ids)


class Batch:
    """The rows, and where each is among the T tokens."""

    __slots__ = ("drawing", "last", "num_tokens", "rows", "starts")

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows
        self.starts: list[int] = []
        """Of each row, its first token."""
        self.last: list[int] = []
        """Of each row, its last token."""
        self.num_tokens = 0
        for row in rows:
            self.starts.append(self.num_tokens)
            self.num_tokens += len(row.ids)
            self.last.append(self.num_tokens - 1)
        self.drawing = [r for r, row in enumerate(rows) if row.draws]
        """The rows after which a token is to be drawn."""

    def ids(self, device: torch.device) -> Tensor:
        """[1, T] int64."""
        return torch.tensor([[token for row in self.rows for token in row.ids]], device=device)
