"""What a container leaves this process of the machine's memory: control groups, version 1 and 2.

A group's limit holds for all that its members use, page cache included; but cache of files is given back when memory is
asked for, so it does not count as used. Every group from the process's own up to the root may have a limit.

https://docs.kernel.org/admin-guide/cgroup-v2.html, https://docs.kernel.org/admin-guide/cgroup-v1/memory.html
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_FILES = {  # limit, used, and the fields of memory.stat that are cache of files
    "v1": ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
    "v2": ("memory.max", "memory.current", ("inactive_file", "active_file")),
}


@dataclass(frozen=True, slots=True)
class Limit:
    """One group's, in bytes."""

    limit: float
    used: float
    """By processes, without cache of files."""


def memory_limits(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[Limit]:
    """The limits that hold for this process; none where there are no control groups."""
    found = []
    for version, directory in _groups(root, own):
        limit_file, used_file, cache_fields = _FILES[version]
        limit, used = _text(directory / limit_file).strip(), _text(directory / used_file).strip()
        if not limit.isdigit() or not used.isdigit():  # "max", or no such file
            continue
        lines = (line.partition(" ") for line in _text(directory / "memory.stat").splitlines())
        cache = sum(float(value) for name, _, value in lines if name in cache_fields and value.isdigit())
        found.append(Limit(float(limit), max(0.0, float(used) - cache)))
    return found


def _groups(root: Path, own: Path) -> Iterator[tuple[str, Path]]:
    """This process's group in each hierarchy that counts memory, and the groups around it.

    In a container the path may be the host's, which is not to be seen here; the root then is the container's group.
    """
    for line in _text(str(own)).splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            version, base = "v2", root if (root / "cgroup.controllers").exists() else root / "unified"
        elif "memory" in controllers.split(","):
            version, base = "v1", root / "memory"
        else:
            continue
        inside = PurePosixPath(path.lstrip("/"))
        if ".." in inside.parts:  # outside of what this namespace shows
            inside = PurePosixPath()
        for group in (inside, *inside.parents) if inside.parts else (inside,):
            yield version, base / group


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
