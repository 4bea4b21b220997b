"""Whether this process is one of several that torchrun started; without torch, for what comes before it is loaded."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from manyhands.errors import EndedElsewhere, ManyhandsError


def started_together() -> bool:
    """Whether this process was started as one of several, as torchrun does it."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


@contextmanager
def alike() -> Iterator[None]:
    """For what every process of a job does alike before they meet: the first on each machine says what is wrong."""
    try:
        yield
    except ManyhandsError as error:
        if started_together() and os.environ.get("LOCAL_RANK", "0") != "0":
            raise EndedElsewhere(error.exit_code) from error
        raise
