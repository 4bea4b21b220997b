"""This machine, as it was measured: `measure.py` makes it, `remember.py` keeps it."""

import os
import platform

from manyhands.config import Strict
from manyhands.plan.machine import Machine


class Here(Strict):
    """What was measured, and on what."""

    version: int = 1
    key: str
    """Changes when the figures no longer hold: another host, other cores, more memory."""
    measured: str
    """When, UTC."""
    machine: Machine
    """What plans are made for: the GPU, if there is one that works."""
    processor: Machine
    cpu: str
    cores: int
    """That this process may use."""
    threads: int
    """That the measurement used."""
    features: tuple[str, ...]
    """Instructions that matter for matrices, of those the processor has."""


def machine_key() -> str:
    """Host, processor count and memory."""
    pages = os.sysconf("SC_PHYS_PAGES") if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()) else 0
    return f"{platform.node()}/{platform.machine()}/{os.cpu_count()}/{pages}"
