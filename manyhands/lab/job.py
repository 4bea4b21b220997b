"""What an experiment is given: its size, its seeds, a place for files, a way to say how far it is, a clock."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

_QUIET = 0.9
"""Least share of the time that the calling thread computed, for its times to be believed."""


@dataclass(slots=True)
class Clock:
    """Times one thing. Times count only where nothing else had the processor."""

    seconds: float = 0.0
    """Wall clock."""
    computing: float = 0.0
    """Of these, seconds in which the calling thread had a processor."""

    @property
    def quiet(self) -> bool:
        """Whether the calling thread hardly ever waited, for another program or for a worker thread that did."""
        return self.computing >= _QUIET * self.seconds


@dataclass(frozen=True, slots=True)
class Job:
    """One run of an experiment."""

    quick: bool
    """The small size of the test suite: a few seconds on one core, direction only."""
    seeds: tuple[int, ...]
    scratch: Path
    """An empty directory that is deleted afterwards."""
    data: Path | None = None
    """What the user named with `--data`."""
    note: Callable[[str], None] = lambda text: None
    """Says in one line what is done now, for a person who waits."""
    clocks: list[Clock] = field(default_factory=list)
    """Every clock so far."""

    @contextmanager
    def clock(self) -> Iterator[Clock]:
        """`with job.clock() as clock: …`, then `clock.seconds`. For work of the calling thread, not for waiting."""
        clock = Clock()
        wall, mine = time.perf_counter(), time.thread_time()
        try:
            yield clock
        finally:
            clock.seconds, clock.computing = time.perf_counter() - wall, time.thread_time() - mine
            self.clocks.append(clock)

    @property
    def quiet(self) -> bool:
        """Whether every clock so far was: if not, ratios of times say nothing and are not judged."""
        return all(clock.quiet for clock in self.clocks)
