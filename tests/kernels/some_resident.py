"""A source for tests: some experts are in memory, the others are copied there when a step waits for them."""

from collections.abc import Callable, Iterable, Sequence

import torch

from manyhands.quant import FetchedExperts, PackedExperts


def aligned(record: torch.Tensor) -> torch.Tensor:
    """A copy on a boundary of 64 bytes."""
    room = torch.empty(record.numel() + 64, dtype=torch.uint8)
    first = -room.data_ptr() % 64
    return room[first : first + record.numel()].copy_(record)


class SomeResident:
    """Of `packed`, which is the disk, only `resident` experts are in the table."""

    def __init__(
        self, packed: PackedExperts, resident: Iterable[int] = (), meanwhile: Callable[[], None] = lambda: None
    ) -> None:
        self.disk, self.meanwhile = packed.records, meanwhile
        self.held: dict[int, torch.Tensor] = {}
        self.late: list[torch.Tensor] = []
        self.asked: list[tuple] = []
        self.experts = FetchedExperts(torch.zeros(packed.num_experts, dtype=torch.int64), packed.layout, self)
        self.keep(resident)

    def keep(self, resident: Iterable[int]) -> None:
        """Only these are in memory from now on, at new places; where others were is overwritten."""
        for old in self.held.values():
            old.fill_(255)
        self.held = {e: aligned(self.disk[e]) for e in resident}
        for e in range(len(self.disk)):
            self.experts.table[e] = self.held[e].data_ptr() if e in self.held else 0

    def begin(self, layer: int, experts: Sequence[int]) -> None:
        """What was late before is late again."""
        for old in self.late:
            old.fill_(255)
        self.late = []
        self.asked.append(("begin", layer, list(experts)))

    def wait(self, layer: int, expert: int) -> int:
        """A copy."""
        self.asked.append(("wait", layer, expert))
        self.meanwhile()
        self.late.append(aligned(self.disk[expert]))
        return self.late[-1].data_ptr()
