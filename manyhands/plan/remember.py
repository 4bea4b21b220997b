"""This machine, measured once and kept in the user's cache directory."""

import json
import sys

from manyhands.config import parse
from manyhands.errors import ConfigError, StorageError
from manyhands.files import write_atomic
from manyhands.plan.here import Here, machine_key
from manyhands.plan.host import cache_file
from manyhands.strict_json import read_object


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
