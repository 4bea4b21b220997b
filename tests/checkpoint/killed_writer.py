"""Helper of test_files: overwrite a checkpoint again and again, killed at every step of the way.

For n = 0, 1, … a forked child replaces DIR/n/ckpt and sends itself SIGKILL just before its n-th system call that
changes the disk. The first child that gets through ends the loop; DIR/done then holds its number.
"""

import os
import signal
import sys
from pathlib import Path

from manyhands.checkpoint import building


def save(directory: Path, text: str) -> None:
    with building(directory, overwrite=True) as new:
        for name in ("a.txt", "sub/b.txt"):
            (new / name).parent.mkdir(exist_ok=True)
            (new / name).write_text(text)


def die_at(count: int) -> None:
    calls = 0

    def wrap(function):
        def counted(*args, **kwargs):
            nonlocal calls
            if calls == count:
                os.kill(os.getpid(), signal.SIGKILL)
            calls += 1
            return function(*args, **kwargs)

        return counted

    for name in ("mkdir", "open", "fsync", "rename", "replace", "unlink", "rmdir"):
        setattr(os, name, wrap(getattr(os, name)))


if __name__ == "__main__":
    root = Path(sys.argv[1])
    os.fsync = lambda descriptor: None  # it is a step to be killed at, but a kill loses nothing of what was written
    for n in range(200):
        save(root / str(n) / "ckpt", "old")
        if (child := os.fork()) == 0:
            die_at(n)
            save(root / str(n) / "ckpt", "new")
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            (root / "done").write_text(str(n))
            break
