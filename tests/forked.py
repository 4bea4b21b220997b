"""What the program starts as `python -m MODULE …`, forked from a process that has imported torch: for tests.

    monkeypatch.setattr(subprocess, "Popen", ForkedPopen)

The module runs as it would from the command line, in a process of its own with its own streams and environment; only
the three seconds are saved that every new interpreter takes to import torch.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import IO

from tests.gloo import PRELOADED


class ForkedPopen:
    """The part of `subprocess.Popen` that is asked of a child whose streams are files."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        stdin: IO[bytes] | int,
        stdout: IO[bytes],
        stderr: IO[bytes] | int,
        env: Mapping[str, str],
        start_new_session: bool = False,
    ) -> None:
        assert list(command[:2]) == [sys.executable, "-m"]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        files = [
            os.devnull if stdin == subprocess.DEVNULL else stdin.name,  # type: ignore[union-attr]
            stdout.name,
            stdout.name if stderr == subprocess.STDOUT else stderr.name,  # type: ignore[union-attr]
        ]
        self._process = context.Process(target=_run, args=(command[2:], files, dict(env), start_new_session))
        self._process.start()

    def poll(self) -> int | None:
        """The exit code, or minus the signal that ended it; None while it runs."""
        return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        """As `poll` finds it."""
        return self._process.exitcode

    def wait(self) -> int | None:
        """Until it has ended."""
        self._process.join()
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """To it alone."""
        assert self._process.pid is not None
        if self._process.exitcode is None:
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        """At once."""
        self._process.kill()

    def terminate(self) -> None:
        """SIGTERM."""
        self._process.terminate()


def _run(command: Sequence[str], files: Sequence[str], environment: dict[str, str], new_session: bool) -> None:
    if new_session:
        os.setsid()
    for descriptor, name in enumerate(files):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND if descriptor else os.O_RDONLY), descriptor)
    sys.stdin = os.fdopen(0, closefd=False)  # multiprocessing gave it /dev/null
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [command[0], *command[1:]]
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)
