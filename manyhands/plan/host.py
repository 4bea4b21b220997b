"""What the operating system says about this machine: cores, memory, instructions, where to keep what was measured.

Reads /proc where there is one.
"""

import os
import platform
from pathlib import Path

from manyhands.plan.cgroup import memory_limits
from manyhands.system import installed_memory

FEATURES = (
    "avx2",
    "avx512f",
    "avx512_bf16",
    "avx512_vnni",
    "avx_vnni",
    "amx_bf16",
    "amx_int8",
    "asimddp",
    "i8mm",
    "bf16",
)


def cache_file() -> Path:
    """`$XDG_CACHE_HOME/manyhands/machine.json`; ~/.cache without the variable."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return root / "manyhands" / "machine.json"


def cpu_name() -> str:
    """The processor's name."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_features() -> tuple[str, ...]:
    """Those of `FEATURES` that the processor and the kernel offer."""
    flags = (_cpuinfo("flags") or _cpuinfo("Features")).split()
    return tuple(name for name in FEATURES if name in flags)


def usable_cores() -> int:
    """Processors that this process may run on: its affinity and its container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _text("/sys/fs/cgroup/cpu.max").partition(" ")
    if quota.isdigit() and period.strip().isdigit():
        cores = min(cores, max(1, int(quota) // max(1, int(period))))
    return cores


def usable_memory() -> float:
    """Bytes that this process may have: the machine's, or its container's limit."""
    total = float(installed_memory())
    return min([total, *(group.limit for group in memory_limits())])


def free_memory() -> float | None:
    """Bytes that are available now, to the machine and within its container; None where the system does not say."""
    left = [max(0.0, group.limit - group.used) for group in memory_limits()]
    for line in _text("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            left.append(float(line.split()[1]) * 1024)
    return min(left, default=None)


def resident_memory() -> int:
    """Bytes that this process has in memory now; 0 where the system does not say."""
    return _status("VmRSS:")


def peak_memory() -> int:
    """The most bytes that this process has had in memory; 0 where the system does not say."""
    return _status("VmHWM:")


def _status(field: str) -> int:
    for line in _text("/proc/self/status").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return 0


def _cpuinfo(field: str) -> str:
    for line in _text("/proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return ""


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
