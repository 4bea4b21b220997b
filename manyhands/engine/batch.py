"""What one forward pass runs: the next tokens of some sequences, one behind the other, without padding.

T tokens of R rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from manyhands.layers.cache import Cache
from manyhands.moe.edit import NO_EDITS, Edits, replays, rows_of


@dataclass(slots=True)
class Row:
    """The next tokens of one sequence."""

    ids: list[int]
    cache: Cache
    """What was computed of its earlier tokens; the pass extends it."""
    draws: bool = True
    """Whether a token is to be drawn after the last of these: where a prompt is run in chunks, only after the last."""

    every: bool = False
    """Whether logits of all these tokens are wanted, not of the last alone."""
    edits: Edits | None = None
    """What layers are told of the routing of these tokens."""

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

    __slots__ = ("drawing", "draws", "last", "logits", "num_tokens", "rows", "starts")

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows
        self.starts: list[int] = []
        """Of each row, its first token."""
        self.last: list[int] = []
        """Of each row, its last token."""
        self.draws: list[int] = []
        """The tokens whose logits are wanted, in ascending order."""
        self.logits: list[slice] = []
        """Of each row, where its tokens' logits are among those."""
        self.num_tokens = 0
        for row in rows:
            self.starts.append(self.num_tokens)
            self.num_tokens += len(row.ids)
            self.last.append(self.num_tokens - 1)
            before = len(self.draws)
            if row.every:
                self.draws += range(self.starts[-1], self.num_tokens)
            elif row.draws:
                self.draws.append(self.last[-1])
            self.logits.append(slice(before, len(self.draws)))
        self.drawing = [r for r, row in enumerate(rows) if row.draws]
        """The rows after which a token is to be drawn."""

    @property
    def ids(self) -> list[int]:
        """The T tokens."""
        return self.rows[0].ids if len(self.rows) == 1 else [token for row in self.rows for token in row.ids]

    @property
    def counts(self) -> list[int]:
        """Of each row, its tokens."""
        return [len(row.ids) for row in self.rows]

    @property
    def caches(self) -> list[Cache]:
        """Of each row."""
        return [row.cache for row in self.rows]

    @property
    def edits(self) -> Edits:
        """Of a batch that `alike` made."""
        return self.rows[0].edits or NO_EDITS

    def alike(self) -> "Iterator[Batch]":
        """The same tokens as batches whose rows are told the same of their routing; a replay is each row's own."""
        rows: list[Row] = []
        for row in self.rows:
            if rows and (row.edits is not rows[0].edits or (row.edits and replays(row.edits))):
                yield Batch(rows)
                rows = []
            rows.append(row)
        yield Batch(rows)

    def parts(self, most: int) -> "Iterator[Batch]":
        """The same tokens as batches of at most so many, to be run one after the other."""
        if self.num_tokens <= most:
            yield self
            return
        rows: list[Row] = []
        room = most
        for row in self.rows:
            first = 0
            while first < len(row.ids):
                ids = row.ids[first : first + room]
                first, room = first + len(ids), room - len(ids)
                edits = row.edits
                if edits and replays(edits):
                    edits = rows_of(edits, slice(first - len(ids), first))
                rows.append(Row(ids, row.cache, row.draws and first == len(row.ids), row.every, edits))
                if not room:
                    yield Batch(rows)
                    rows, room = [], most
        if rows:
            yield Batch(rows)
