"""The section that shows a measured machine."""

from manyhands.format import show
from manyhands.plan.disk import RECORD_BYTES, THREADS
from manyhands.plan.here import Here
from manyhands.plan.report.figure import Figure, Section


def machine_section(here: Here) -> Section:
    """Processor, GPU if there is one, memory, disk."""
    cpu, gpu = here.processor, here.machine if here.machine.kind == "gpu" else None
    threads = f"{here.threads} threads on {here.cores} usable cores"
    figures = [Figure("memory", cpu.memory, "B"), Figure("read bandwidth", cpu.bandwidth, "B/s", note=threads)]
    figures += [Figure(f"matrix rate, {name}", rate, "FLOP/s") for name, rate in cpu.rates.items()]
    figures.append(Figure("disk read", cpu.disk, "B/s", note="in order, past the page cache"))
    record = f"records of {show(RECORD_BYTES, 'B')}, {THREADS} at a time: as experts are read"
    figures.append(Figure("disk read at random", cpu.disk_random, "B/s", note=record))
    if gpu is not None:
        figures += [Figure("GPU memory", gpu.memory, "B", note=gpu.title)]
        figures += [Figure("GPU read bandwidth", gpu.bandwidth, "B/s")]
        figures += [Figure(f"GPU matrix rate, {name}", rate, "FLOP/s") for name, rate in gpu.rates.items()]
    return Section("machine", f"{here.cpu}: {', '.join(here.features) or 'features unknown'}", figures)
