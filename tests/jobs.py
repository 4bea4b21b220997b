"""The command line on several processes that torchrun would have started, without its cost: for tests.

    done = job(2, "train", "--preset", "tiny", …)        # a `Done` of each rank, in their order

Processes are forked from the server that `gloo.on_processes` uses. The store they meet at is kept here, as torchrun
keeps it: it outlives any of them, and those of a later `attempt` with the same `store` are a job started again.
"""

import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path

from torch.distributed import TCPStore

from tests.gloo import PRELOADED
from tests.small_runs import Done


@dataclass
class Job:
    """Processes that run, and where what they print goes."""

    processes: list[BaseProcess]
    folder: Path

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        """Send a signal."""
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def wait(self, timeout: float = 60.0) -> list[Done]:
        """What each left behind. Raises `AssertionError` if one has not ended in time: it hangs."""
        ends = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, ends - time.monotonic()))
        found = [
            Done(-99 if process.exitcode is None else process.exitcode, *map(self._said, (rank, rank), ("out", "err")))
            for rank, process in enumerate(self.processes)
        ]
        assert all(process.exitcode is not None for process in self.processes), f"still running: {found}"
        return found

    def _said(self, rank: int, stream: str) -> str:
        return (self.folder / f"{rank}.{stream}").read_text()


def store_here() -> TCPStore:
    """Where a job's processes meet."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))


@contextmanager
def started(
    size: int,
    *arguments: str,
    before: Callable[[int], None] | None = None,
    store: TCPStore | None = None,
    attempt: int = 0,
) -> Iterator[Job]:
    """The processes while they run; `before(rank)`, of a module, is called in each of them first."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    store = store or store_here()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_rank, args=(rank, size, store.port, attempt, folder, arguments, before))
            for rank in range(size)
        ]
        try:
            for process in processes:
                process.start()
            yield Job(processes, Path(folder))
        finally:
            for process in processes:
                process.kill()
                process.join()


def job(
    size: int,
    *arguments: str,
    before: Callable[[int], None] | None = None,
    store: TCPStore | None = None,
    attempt: int = 0,
) -> list[Done]:
    """What each process left behind."""
    with started(size, *arguments, before=before, store=store, attempt=attempt) as running:
        return running.wait()


def _rank(
    rank: int,
    size: int,
    port: int,
    attempt: int,
    folder: str,
    arguments: tuple[str, ...],
    before: Callable[[int], None] | None,
) -> None:
    for stream, descriptor in (("out", 1), ("err", 2)):
        file = os.open(f"{folder}/{rank}.{stream}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, descriptor)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": str(attempt),
    }
    import torch

    from manyhands.cli.main import main

    torch.set_num_threads(1)
    assert threading.current_thread() is threading.main_thread()
    if before is not None:
        before(rank)
    sys.argv = ["manyhands", *arguments]
    main()
