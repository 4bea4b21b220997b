"""The share of a layer's time that two processes, and four, spend in all-to-all as the link gets slower."""

from manyhands.lab.experiment import Arm, Chart, Criterion, Curve, Figure, Outcome
from manyhands.lab.job import Job
from manyhands.lab.spread import Size, Spread, measure

_DELAYS = (0.0, 0.001, 0.01, 0.05)
_QUICK_DELAYS = (0.0, 0.02)
_CLOSE = 1e-5


def run(job: Job) -> Outcome:
    """Every number of processes with every delay."""
    delays = list(_QUICK_DELAYS if job.quick else _DELAYS)
    found: dict[int, list[Spread]] = {}
    sizes = {}
    for ranks in (2,) if job.quick else (2, 4):
        job.note(f"{ranks} processes")
        T, D, F = (64, 32, 32) if job.quick else (512, 256, 512)
        sizes[ranks] = Size(ranks, T, D, 16, 2, F, 3 if job.quick else 20, job.seeds[0])
        found[ranks] = measure(sizes[ranks], delays, job.scratch)
    K = 2
    error = max(each.error for runs in found.values() for each in runs)
    off = max(abs(each.remote / (K * (R - 1) / R) - 1) for R, runs in found.items() for each in runs)
    slow = {R: runs[2 if not job.quick else 1] for R, runs in found.items()}
    criteria = [
        Criterion(
            "outputs are those of one process", f"largest difference {error:.1e} of the largest output", error <= _CLOSE
        ),
        Criterion("K·(R − 1)/R rows a token leave a process, within a fifth", f"{off:.0%} off at worst", off <= 0.2),
        Criterion(
            f"with a pause of {1e3 * delays[2 if not job.quick else 1]:g} ms sending takes most of the time",
            ", ".join(f"{each.sending / each.seconds:.0%} with {R} processes" for R, each in slow.items()),
            all(each.sending > 0.5 * each.seconds for each in slow.values()),
        ),
    ]
    figures = []
    for R, runs in found.items():
        for delay, each in zip(delays, runs, strict=True):
            arm = f"{R} processes, pause {1e3 * delay:g} ms"
            figures += [
                Figure("forward pass", arm, (1e3 * each.seconds,), "ms", 2),
                Figure("share of it in all-to-all", arm, (100 * each.sending / each.seconds,), "%", 0),
            ]
        formula = f"K·(R − 1)/R = {K * (R - 1) / R:.2f}"
        figures.append(Figure("rows a token sends", f"{R} processes", (runs[0].remote,), digits=2, beside=formula))
    chart = Chart(
        "Share of the time spent in all-to-all",
        "pause before each collective, ms",
        "%",
        tuple(
            Curve(f"{R} processes", [1e3 * d for d in delays], [100 * each.sending / each.seconds for each in runs])
            for R, runs in found.items()
        ),
        y_from_zero=True,
    )
    arms = tuple(_arm(size) for size in sizes.values())
    notes = (
        "What one process does while it waits for another counts as sending. manyhands plan --scale computes the same "
        "for published models on published machines.",
    )
    return Outcome(arms, tuple(figures), tuple(criteria), (chart,), notes=notes)


def _arm(size: Size) -> Arm:
    total = sum(p.numel() for p in size.layer().parameters())
    idle = (size.num_experts - size.num_experts_per_tok) * 3 * size.width * size.expert_width
    note = f"{size.num_experts // size.ranks} of {size.num_experts} experts each, {size.tokens} tokens each"
    return Arm(f"{size.ranks} processes", total, total - idle, 2.0 * (total - idle), note)
