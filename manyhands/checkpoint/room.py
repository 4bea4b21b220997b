"""Whether a model fits into memory, from the headers alone: before a byte of its weights is read.

A tensor that is stored as it is used is mapped: its pages come from the file and go again. All else is copied into
memory of the process, which a system that has no more of it ends without a word.
"""

from typing import NamedTuple

import torch

from manyhands import format
from manyhands.checkpoint.assemble import is_whole, stored_dtype
from manyhands.checkpoint.source import Source
from manyhands.config.shapes import tensor_shapes
from manyhands.errors import UserError
from manyhands.plan.host import free_memory, usable_memory

SPARE = 0.03
"""Share of what is free that is left for caches, activations and everybody else."""
CPU = torch.device("cpu")


class Room(NamedTuple):
    """Bytes of a loaded model's weights."""

    copied: int
    mapped: int


def room_for(
    source: Source,
    dtype: torch.dtype | None = None,
    decode: bool = False,
    own: slice | None = None,
    alone: bool = False,
) -> Room:
    """What `from_source` with these arguments takes on the CPU; of experts `own`, and with `alone` nothing else."""
    records = {} if decode else source.records
    inside = {name for record in records.values() for name in record.sections}
    moe = source.config.moe
    part = 1.0 if own is None or moe is None else (own.stop - own.start) / moe.router.num_experts

    def held(name: str) -> float:
        """Which part of a tensor is."""
        return part if ".experts." in name else float(not alone)

    copied, mapped = 0, sum(int(source.files.stored[name].size * held(name)) for name in records)
    for name, shape in tensor_shapes(source.config).items():
        if name in inside:
            continue
        stored = stored_dtype(source, name)
        wanted = stored if dtype is None else dtype
        size = int(torch.Size(shape).numel() * wanted.itemsize * held(name))
        if wanted == stored and is_whole(source, name):
            mapped += size
        else:
            copied += size
    return Room(copied, mapped)


def check_room(
    source: Source,
    dtype: torch.dtype | None = None,
    device: torch.device = CPU,
    decode: bool = False,
    remedy: str | None = None,
    own: slice | None = None,
    alone: bool = False,
) -> None:
    """Refuse what no load could hold: more to copy than is free now, or more in all than this process may ever have.

    `own` and `alone` are `room_for`'s.

    Raises `UserError` that says how much it is, how much there is, and what runs it in less (`remedy`, if the caller
    knows better).
    """
    if device.type != "cpu":
        return  # one tensor at a time passes through here
    copied, mapped = room_for(source, dtype, decode, own, alone)
    free, usable = free_memory(), usable_memory()
    if free is not None and copied > free * (1 - SPARE):
        there = f"{format.show(free, 'B')} is free"
    elif copied + mapped > usable:
        there = f"this process may have {format.show(usable, 'B')}"
    else:
        return
    raise UserError(
        f"{source.path}: its weights take {format.show(copied + mapped, 'B')} of memory; {there}. "
        f"{remedy or _remedy(source, decode)}"
    )


def _remedy(source: Source, decode: bool) -> str:
    if source.packed is None:
        packed = "what that writes also runs with --memory SIZE, most of its experts on disk"
        after = f"; {packed}" if source.config.moe is not None else ""
        return f"`manyhands quantize {source.path} DST` packs it piece by piece{after}"
    if decode:
        return "Packed it is smaller: only training and `convert` need it unpacked"
    if source.packed.experts is None:
        return "`manyhands quantize` with fewer bits makes it smaller"
    return "With --memory SIZE its experts stay on disk; `manyhands quantize` with fewer bits makes it smaller"
