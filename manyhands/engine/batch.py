"""What one forward pass runs: the next tokens of some sequences, one behind the other, without padding.

T tokens of R rows.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from manyhands.layers.cache import Cache


@dataclass(frozen=True, slots=True)
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


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows, and where each begins among the T tokens."""

    rows: list[Row]
    starts: list[int] = field(init=False)
    num_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        starts, total = [], 0
        for row in self.rows:
            starts.append(total)
            total += len(row.ids)
        object.__setattr__(self, "starts", starts)
        object.__setattr__(self, "num_tokens", total)

    def ids(self, device: torch.device) -> Tensor:
        """[T] int64."""
        return torch.tensor([token for row in self.rows for token in row.ids], device=device)

    @property
    def drawing(self) -> list[int]:
        """The rows after which a token is to be drawn."""
        return [r for r, row in enumerate(self.rows) if row.draws]

    def last(self, row: int) -> int:
        """Where among the T tokens a row's last one is."""
        return self.starts[row] + len(self.rows[row].ids) - 1
