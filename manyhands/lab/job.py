"""What an experiment is given: its size, its seeds, a place for files, a way to say how far it is, a clock."""

import os
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


@dataclass(frozen=True, slots=True)
class Processors:
    """What the processors have done until some moment, in seconds."""

    wall: float
    busy: float | None
    """All of them, for anybody, as Linux counts it; None where nobody counts."""
    own: float
    """For this process and those of its children that have ended."""

    @classmethod
    def now(cls) -> "Processors":
        """Until now."""
        own = os.times()
        busy = None
        try:
            counted = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
            user, nice, system, _idle, _waiting, *rest = map(int, counted)
            busy = (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError, IndexError):
            pass
        return cls(time.perf_counter(), busy, own.user + own.system + own.children_user + own.children_system)

    def others(self) -> float | None:
        """Processors that somebody else has kept busy since, on average; None where nobody counts."""
        now = Processors.now()
        if self.busy is None or now.busy is None or now.wall <= self.wall:
            return None
        return max(0.0, now.busy - self.busy - (now.own - self.own)) / (now.wall - self.wall)


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
    begun: Processors = field(default_factory=lambda: Processors.now())

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
        """Whether other programs left the processor alone so far: if not, ratios of times are not judged.

        Either the timed thread hardly ever waited (worker threads of a library can make it wait too), or the system
        counts little work that is not this process's.
        """
        seconds = sum(clock.seconds for clock in self.clocks)
        if sum(clock.computing for clock in self.clocks) >= _QUIET * seconds:
            return True
        others = self.begun.others()
        return others is not None and others <= 1 - _QUIET
