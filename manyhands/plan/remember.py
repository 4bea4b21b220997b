"""This machine, measured once and kept in the user's cache directory."""

import json
import os
import platform
import sys

from manyhands.config import Strict, parse
from manyhands.errors import ConfigError, StorageError
from manyhands.files import write_atomic
from manyhands.plan.host import cache_file
from manyhands.plan.machine import Machine
from manyhands.strict_json import read_object


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
    pages = os.sysconf("SC_PHYS_PAGES") if "SC_PHYS_PAGES" in os.sysconf_names else 0
    return f"{platform.node()}/{platform.machine()}/{os.cpu_count()}/{pages}"


def remembered() -> Here | None:
    """What was measured before, if it still holds; None otherwise, also for a file that cannot be read."""
    try:
        here = parse(Here, read_object(cache_file(), 1 << 20, ConfigError))
    except ConfigError:
        return None
    return here if here.key == machine_key() and here.version == 1 else None


def measured(*, again: bool = False, quiet: bool = False) -> Here:
    """This machine: remembered, or measured now, which takes some seconds, and remembered."""
    known = None if again else remembered()
    if known is not None:
        return known
    from manyhands.plan.measure import measure

    if not quiet:
        print("measuring this machine: memory, matrices, disk (some seconds, once) …", file=sys.stderr, flush=True)
    here = measure(cache_file().parent)
    try:
        write_atomic(cache_file(), json.dumps(here.model_dump(mode="json"), indent=2) + "\n")
    except StorageError as error:
        print(f"manyhands: the measurement is not remembered: {error}", file=sys.stderr)
    return here
