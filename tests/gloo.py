"""Work on several processes joined by gloo, for tests.

    def work(ranks: Group, width: int) -> float: ...      # of a module, not of a function
    found = on_processes(4, work, 16)                      # what each rank returned, in their order

Processes are forked from a server that has imported torch once, so that a test pays 0.1 s for each and not 3 s.
"""

import multiprocessing
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

T = TypeVar("T")
TIMEOUT = 120.0
"""Seconds after which a test has hung."""
PRELOADED = [
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "manyhands.models",
    "manyhands.train.loop",
    "tests.small_runs",
    "tests.frozen",
]


def on_processes(size: int, work: Callable[..., T], *args: Any, timeout: float = TIMEOUT) -> list[T]:
    """What `work(ranks, *args)` returned on each of `size` ranks; `work` and what goes in and out can be pickled.

    Warnings are errors on every rank, as they are here. If one fails the others are ended and its traceback is raised
    as an `AssertionError`; so is a job that has not ended within `timeout` seconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(size)]
        processes = [
            context.Process(target=_rank, args=(writer, rank, size, folder, work, args), daemon=True)
            for rank, (_, writer) in enumerate(pipes)
        ]
        try:
            for process, (_, writer) in zip(processes, pipes, strict=True):
                process.start()
                writer.close()
            return _collect([reader for reader, _ in pipes], timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()
                process.close()


def _collect(readers: list[Connection], timeout: float) -> list[Any]:
    found: dict[int, Any] = {}
    ends = time.monotonic() + timeout
    while len(found) < len(readers):
        waiting = {reader: rank for rank, reader in enumerate(readers) if rank not in found}
        ready = wait(waiting, max(0.0, ends - time.monotonic()))
        if not ready:
            raise AssertionError(f"ranks {sorted(waiting.values())} did not end within {timeout:g} s")
        for reader in ready:
            rank = waiting[reader]  # type: ignore[index]
            try:
                error, value = reader.recv()  # type: ignore[union-attr]
            except EOFError:
                error, value = "died without a word", None
            if error:
                raise AssertionError(f"rank {rank} of {len(readers)}: {error}")
            found[rank] = value
    return [found[rank] for rank in range(len(readers))]


def _rank(
    writer: Connection, rank: int, size: int, folder: str, work: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    import torch
    import torch.distributed as dist

    from manyhands.parallel.group import Group

    torch.set_num_threads(1)
    warnings.simplefilter("error")
    try:
        store = dist.FileStore(f"{folder}/meet", size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
        group = dist.group.WORLD
        assert group is not None
        value = work(Group(group, rank, size, torch.device("cpu"), store), *args)
        dist.barrier()
        dist.destroy_process_group()
        writer.send((None, value))
    except BaseException:
        writer.send((traceback.format_exc(), None))
