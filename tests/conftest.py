"""Shared by every test: one thread, so that the suite's speed does not hang on what else the machine does; no search
for garbage among what collection made; no wait for the disk; and the level at which the native kernels run,
`--level avx2`, for the machines that this one is not."""

import gc
import os
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path

import pytest
import torch

import manyhands.kernels
from manyhands.kernels.native import library, views

torch.set_num_threads(1)


def _not_waiting(descriptor: int) -> None:
    os.fstat(descriptor)  # a wrong one is an error still


os.fsync = _not_waiting  # what a test writes need not outlive a power cut


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--level NAME`: the native kernels' default in this process (processes that tests start take their own)."""
    parser.addoption("--level", choices=library.LEVELS, help="run the native kernels at this level")


def pytest_configure(config: pytest.Config) -> None:
    """Make the level the default one. What this machine was measured at, and remembers, is no matter of a test."""
    fonts = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "matplotlib"
    os.environ.setdefault("MPLCONFIGDIR", str(fonts))  # a list of fonts takes matplotlib seconds to make
    config.add_cleanup(lambda: shutil.rmtree(empty, ignore_errors=True))
    os.environ["XDG_CACHE_HOME"] = empty = tempfile.mkdtemp(prefix="manyhands-tests-")
    name = config.getoption("level")
    if name is None:
        return
    if name not in library.levels():
        raise pytest.UsageError(f"--level {name}: this processor has {', '.join(library.levels())}")
    library.VERIFIED = library.LEVELS[: library.LEVELS.index(name) + 1]
    library.default_level.cache_clear()
    views._run.cache_clear()
    manyhands.kernels._LEVEL = library.default_level()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Modules and 12,000 tests are no garbage: looking through them again and again is a third of collection's time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what ran, above all where it is less than there could be."""
    missing = library.missing()
    level = f"native kernels: {library.default_level()}" if missing is None else f"NO NATIVE KERNELS ({missing})"
    terminalreporter.write_line(level + ("" if missing is None else ": whatever tests them was skipped"))
