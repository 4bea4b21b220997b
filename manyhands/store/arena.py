"""Room for records: slots of one size in one piece of memory that belongs to no file."""

import contextlib
import mmap

import torch

from manyhands.errors import ManyhandsError

PAGE = mmap.PAGESIZE
_HUGE = 2 << 20
_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)


class Arena:
    """`num_slots` slots of `slot_bytes`, each beginning on a page. Memory is taken when a slot is first filled.

    Raises `ManyhandsError` where there is no address space for it.
    """

    def __init__(self, num_slots: int, slot_bytes: int) -> None:
        self.num_slots, self.slot_bytes = num_slots, -(-slot_bytes // PAGE) * PAGE
        size = max(self.num_slots * self.slot_bytes, PAGE)
        try:
            self._map = mmap.mmap(-1, size, flags=_FLAGS)
        except (OSError, OverflowError, ValueError) as error:
            raise ManyhandsError(f"no memory for {num_slots} records of {slot_bytes} bytes: {error}") from None
        if self.slot_bytes >= _HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without them
                self._map.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self._view = memoryview(self._map)
        self._first = self._bytes.data_ptr()

    def address(self, slot: int) -> int:
        """Where a slot is."""
        return self._first + slot * self.slot_bytes

    def view(self, slot: int, size: int) -> memoryview:
        """The first `size` bytes of a slot, to be written to."""
        first = slot * self.slot_bytes
        return self._view[first : first + size]

    def tensor(self, slot: int, size: int) -> torch.Tensor:
        """The same, to be read: [size] uint8. Others may be read into the slot later."""
        first = slot * self.slot_bytes
        return self._bytes[first : first + size]
