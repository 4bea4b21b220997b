"""What `choose` looks at where nobody says: the catalogue's models that may be had, formats, machines."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from manyhands.catalog import Entry, entries
from manyhands.plan.machine import Machine, machine_named, machine_names
from manyhands.plan.storage import BF16, Storage, storage_named, weight_bytes
from manyhands.plan.subject import Subject, of_catalogue

LADDER = ("bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m")
"""Formats that every model is tried in, as far as they are narrower than what is published.

Not below 4 bits: of so many bytes a larger model in 4 bits is better than a smaller one in more, and than a still
larger one in fewer (arXiv 2212.09720). `--format` tries any other.
"""
FOR_RATES = {"fp8": "fp8", "nvfp4": "fp4"}
"""Formats that are tried on machines with that matrix rate."""
NARROWER = 0.97
"""Of the published bytes, what another format must stay below."""
NOT_RELEASED = "not released"
ANY_DEVICES = 8
"""Devices of one kind that may be bought where any machine will do."""


@dataclass(frozen=True, slots=True)
class Known:
    """A model of the catalogue."""

    id: str
    subject: Subject
    entry: Entry


def known(wanted: Callable[[Known], bool]) -> Iterator[Known]:
    """Decoders whose weights can be had, of which `wanted` is true, the newest first."""
    for entry in sorted(entries(), key=lambda entry: entry.released, reverse=True):
        if entry.license == NOT_RELEASED or entry.architecture == "undisclosed":
            continue
        found = Known(entry.id, of_catalogue(entry), entry)
        if found.subject.sizes is not None and wanted(found):
            yield found


def formats(subject: Subject) -> list[tuple[Storage, str | None]]:
    """(format, the matrix rate without which it is not tried): as published, and narrower ones."""
    native = subject.native or BF16
    most = NARROWER * weight_bytes(subject.counts, native)
    named = [(storage_named(name, native), FOR_RATES.get(name)) for name in (*LADDER, *FOR_RATES)]
    return [(native, None), *(each for each in named if weight_bytes(subject.counts, each[0]) < most)]


def every_machine() -> list[Machine]:
    """All of the table."""
    return [machine_named(name) for name in machine_names()]
