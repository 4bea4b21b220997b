"""Threads that read records. The interpreter's lock is not held while the kernel reads, so they read at once.

Of what waits to be read, what lies first on the disk is read first.
"""

import heapq
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count

from manyhands.errors import DiskError
from manyhands.store.disk import RecordFile

NUM_READERS = 4


@dataclass(eq=False, slots=True)
class Read:
    """A record to read. `done` and `error` are the readers'."""

    file: RecordFile
    file_number: int
    offset: int
    view: memoryview
    done: bool = False
    error: BaseException | None = None
    order: tuple[int, int, int] = field(init=False)

    def __post_init__(self) -> None:
        self.order = (self.file_number, self.offset, next(_numbers))


_numbers = count()


class Readers:
    """`start` reads, `wait` for one. `close` ends the threads, which hold nothing but this object."""

    def __init__(self, num_threads: int = NUM_READERS) -> None:
        assert num_threads > 0
        self.num_bytes = 0
        """That the kernel gave."""
        self._pid = os.getpid()
        self._lock = threading.RLock()  # a collection of garbage in one of the threads may close them
        self._work, self._news = threading.Condition(self._lock), threading.Condition(self._lock)
        self._queue: list[tuple[tuple[int, int, int], Read]] = []
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"manyhands-reader-{i}", daemon=True) for i in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def start(self, reads: Iterable[Read]) -> None:
        """Queue them. Raises `DiskError` when closed, and in a process that was forked, which has no such threads."""
        if os.getpid() != self._pid:
            raise DiskError("a model with experts on disk cannot be used in a forked process: load it there")
        with self._lock:
            if self._closed:
                raise DiskError("the model's experts are on disk, and its store was closed: load it again")
            for read in reads:
                heapq.heappush(self._queue, (read.order, read))
            self._work.notify_all()

    def wait(self, read: Read) -> None:
        """Until it is done. Raises what was wrong with it: `DiskError`."""
        self.settle(read)
        if read.error is not None:
            raise read.error

    def settle(self, read: Read) -> None:
        """Until nobody writes to its view any more."""
        if read.done or os.getpid() != self._pid:
            return
        with self._lock:
            while not read.done:
                self._news.wait()

    def close(self) -> bool:
        """End the threads when they have ended what they read; what is queued is not read any more.

        Whether they have ended when it returns: not if one of them calls it, nor in a forked process.
        """
        if os.getpid() != self._pid:
            return False
        with self._lock:
            self._closed = True
            for _, read in self._queue:
                read.error, read.done = DiskError("the store was closed"), True
            self._queue.clear()
            self._work.notify_all()
            self._news.notify_all()
        if threading.current_thread() in self._threads:
            return False
        for thread in self._threads:
            thread.join()
        return True

    def _run(self) -> None:
        while True:
            with self._lock:
                while not self._queue and not self._closed:
                    self._work.wait()
                if self._closed:
                    return
                read = heapq.heappop(self._queue)[1]
            error: BaseException | None = None
            given = 0
            try:
                given = read.file.read(read.view, read.offset)
            except BaseException as problem:  # the waiting thread's to hear
                error = problem
            with self._lock:
                self.num_bytes += given
                read.error, read.done = error, True
                self._news.notify_all()
