"""Measure this machine: what it reads per second, what it multiplies per second, its memory, its disk. Under 10 s.

The only module of the planner that needs torch, and it imports it when it measures. Each figure is the best of several
short trials: others' work on a shared machine can only make it slower.
"""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manyhands.plan.disk import measure_disk
from manyhands.plan.here import Here, machine_key
from manyhands.plan.host import cpu_features, cpu_name, usable_cores, usable_memory
from manyhands.plan.machine import Machine

if TYPE_CHECKING:
    import torch

_READ_BYTES = 1 << 29
_TRIAL_SECONDS = 0.4


def measure(directory: Path) -> Here:
    """Measure now. `directory` is where the disk is measured; it is made if need be."""
    import torch

    host = torch.device("cpu")
    memory = usable_memory()
    disks = measure_disk(directory)
    processor = Machine(
        name="here",
        title=f"this machine ({cpu_name()})",
        kind="cpu",
        memory=memory,
        bandwidth=_bandwidth(host, min(_READ_BYTES, int(memory) // 16)),
        rates=_rates(host, ("fp32", "bf16", "int8")),
        disk=disks[0] if disks else None,
        disk_random=disks[1] if disks else None,
        source=f"measured with torch {torch.__version__}, {torch.get_num_threads()} threads",
    )
    return Here(
        key=machine_key(),
        measured=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=_gpu(processor) or processor,
        processor=processor,
        cpu=cpu_name(),
        cores=usable_cores(),
        threads=torch.get_num_threads(),
        features=cpu_features(),
    )


def _gpu(processor: Machine) -> Machine | None:
    """The first CUDA device, or None without one that works."""
    import torch

    if not torch.cuda.is_available():
        return None
    try:
        device = torch.device("cuda", 0)
        properties = torch.cuda.get_device_properties(device)
        return Machine(
            name="here",
            title=f"this machine ({properties.name})",
            kind="gpu",
            devices=1,
            memory=float(properties.total_memory),
            bandwidth=_bandwidth(device, min(1 << 31, properties.total_memory // 8)),
            rates=_rates(device, ("fp32", "bf16", "int8")),
            disk=processor.disk,
            disk_random=processor.disk_random,
            source=f"measured with torch {torch.__version__}",
        )
    except RuntimeError:  # a driver that is there and does not work, or no memory left
        return None


def _bandwidth(device: "torch.device", size: int) -> float:
    """Bytes per second of reading a tensor far larger than any cache."""
    import torch

    values = torch.ones(size // 4, dtype=torch.float32, device=device)
    return values.numel() * 4 / _best(lambda: values.sum(), device)


def _rates(device: "torch.device", names: tuple[str, ...]) -> dict[str, float]:
    """FLOP/s of square products, by format; a format that torch cannot multiply here is left out."""
    found: dict[str, float] = {}
    for name in names:
        try:
            n = 4096 if device.type == "cuda" else 256
            found[name] = _rate(device, name, n)
            while device.type == "cpu" and n < 2048 and 2 * (2 * n) ** 3 / found[name] < _TRIAL_SECONDS / 4:
                n *= 2
                found[name] = max(found[name], _rate(device, name, n))
        except (RuntimeError, NotImplementedError, AttributeError):
            continue  # no such product on this device, or in this torch: the planner shows a dash
    return found


def _rate(device: "torch.device", name: str, n: int) -> float:
    """FLOP/s of one product of n x n."""
    import torch

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}[name]
    a = torch.ones(n, n, device=device).to(dtype)
    multiply: Callable[..., Any] = torch._int_mm if name == "int8" else torch.mm
    return 2 * n**3 / _best(lambda: multiply(a, a), device)


def _best(work: Callable[[], object], device: "torch.device") -> float:
    """Seconds of the fastest of at least three trials."""
    import torch

    work()
    best, until = float("inf"), time.perf_counter() + _TRIAL_SECONDS
    for trial in range(1000):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
        if trial >= 2 and time.perf_counter() > until:
            break
    return best
