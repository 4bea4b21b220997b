"""The same without what only Linux, or only POSIX, has: no module needs it to be imported, and a run goes through."""

import subprocess
import sys
from pathlib import Path

import pytest

from manyhands import system

WITHOUT = """
import os, pkgutil, sys, importlib
for name in ("fcntl", "resource", "termios", "tty", "pwd", "grp", "readline"):
    sys.modules[name] = None
for name in ("posix_fadvise", "preadv", "pread", "sysconf", "sysconf_names", "O_DIRECT", "O_DIRECTORY", "statvfs",
             "sched_getaffinity"):
    delattr(os, name)
import manyhands
for found in pkgutil.walk_packages(manyhands.__path__, "manyhands."):
    if not found.name.endswith(("__main__", "libmanyhands")):
        importlib.import_module(found.name)
print("imported")
"""


def test_no_module_needs_posix() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True)
    assert done.stdout == "imported\n", done.stderr[-2000:]


def test_reading_without_preadv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    monkeypatch.delattr("os.preadv")
    with open(path, "rb") as file:
        view = memoryview(bytearray(10))
        assert system.read_at(file.fileno(), view, 95) == 5
        assert bytes(view) == bytes([95, 96, 97, 98, 99, 0, 0, 0, 0, 0])
