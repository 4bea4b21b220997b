"""What a request's tokens cost in experts: which it touched, its share of what was read for them.

An expert that r tokens of a step chose is read once, and each of them pays an r-th; the bytes are dealt out whole, so
that the ledgers of all requests of a step add up to what the step read.

R requests of a step, E experts of a layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import numpy.typing as npt

from manyhands.models import AnyModel
from manyhands.moe import ExpertBank, Routing
from manyhands.moe.crew import CrewExperts
from manyhands.store.store import Reads

Counts = npt.NDArray[np.int64]


@dataclass
class Ledger:
    """Of one request, or of several together. The engine's thread writes it."""

    touched: dict[int, npt.NDArray[np.bool_]] = field(default_factory=dict)
    """Per sparse layer, [E]."""
    bytes_ram: int = 0
    """Of experts' weights read from memory."""
    bytes_disk: int = 0
    """Of these, read from disk before."""
    misses: int = 0
    """Of its lookups, experts that were not in memory."""
    stalled: float = 0.0
    """Seconds that its steps waited for them."""
    lookups: int = 0
    """Experts its steps asked for, of each layer once."""
    steps: int = 0
    """That it had a part in."""
    sequences: int = 0
    """That ran in those steps, all together."""

    @property
    def distinct(self) -> int:
        """Experts touched, over all layers."""
        return sum(int(np.count_nonzero(touched)) for touched in self.touched.values())

    def report(self) -> dict[str, object]:
        """As JSON has it. Where all experts are in memory nothing is read from a disk, missed or waited for."""
        hit_rate = 1.0 - self.misses / self.lookups if self.lookups else 1.0
        experts = {
            "distinct": self.distinct,
            "bytes_ram": self.bytes_ram,
            "bytes_disk": self.bytes_disk,
            "hit_rate": hit_rate,
        }
        mean = self.sequences / self.steps if self.steps else 0.0
        return {"experts": experts, "stall_ms": 1000 * self.stalled, "steps": self.steps, "batch_mean": mean}


def bytes_of_experts(model: AnyModel) -> dict[int, int]:
    """By sparse layer, what one expert takes."""
    return {at: _bytes(mlp.experts) for at, mlp in model.sparse_layers().items()}


def step(
    sizes: Mapping[int, int],
    routings: Mapping[int, Routing],
    starts: Sequence[int],
    ledgers: Sequence[Ledger | None],
    reads: Reads | None = None,
) -> None:
    """Enter a step: of each of its requests the first token, and the ledger if it has one; and what it read."""
    kept = {id(ledger): ledger for ledger in ledgers if ledger is not None}
    for ledger in kept.values():
        ledger.steps += 1
        ledger.sequences += len(starts)
        ledger.stalled += 0.0 if reads is None else reads.stalled
    for layer, routing in routings.items():
        counts_RE = _counts(routing, starts)
        shares_RE = shares(sizes[layer], counts_RE)
        read_E = np.zeros(routing.num_experts, np.int64)
        for expert, times in (reads.missed.get(layer, {}) if reads else {}).items():
            read_E[expert] = times
        disk_RE = shares(sizes[layer] * read_E, counts_RE)
        before = {at: ledger.touched.get(layer) for at, ledger in kept.items()}
        seen: dict[int, npt.NDArray[np.bool_]] = {}
        for r, own in enumerate(ledgers):
            if own is None:
                continue
            own.bytes_ram += int(shares_RE[r].sum())
            own.bytes_disk += int(disk_RE[r].sum())
            now = counts_RE[r] > 0
            seen[id(own)] = now | seen[id(own)] if id(own) in seen else now
        for at, now in seen.items():
            kept[at].lookups += int(np.count_nonzero(now))
            kept[at].misses += int(np.count_nonzero(now & (read_E > 0)))
            earlier = before[at]
            kept[at].touched[layer] = now if earlier is None else earlier | now


def shares(size: int | Counts, counts_RE: Counts) -> Counts:
    """[R, E]: of `size` bytes, or of [E] bytes of each expert, each request's part, by its tokens.

    Together they are `size` for every expert that has a token.
    """
    reached = counts_RE.cumsum(0)
    total = np.maximum(reached[-1:], 1)
    upto = size * reached // total
    found: Counts = np.diff(upto, axis=0, prepend=np.zeros_like(upto[:1]))
    return found


def _counts(routing: Routing, starts: Sequence[int]) -> Counts:
    """[R, E]: tokens of each request that chose each expert."""
    ids_TK, E = routing.expert_ids.cpu().numpy(), routing.num_experts
    ends = [*starts[1:], len(ids_TK)]
    rows = [ids_TK[first:end].ravel() for first, end in zip(starts, ends, strict=True)]
    return np.stack([np.bincount(row[row >= 0], minlength=E).astype(np.int64) for row in rows])


def _bytes(bank: ExpertBank) -> int:
    if isinstance(bank, CrewExperts):
        return _bytes(bank.here) if bank.here.num_experts else 0  # where this process holds none it knows no size
    fetched = bank.fetched_experts()
    if fetched is not None:
        return fetched.layout.record_bytes
    held = chain(bank.parameters(), bank.buffers())
    return sum(tensor.numel() * tensor.element_size() for tensor in held) // bank.num_experts
