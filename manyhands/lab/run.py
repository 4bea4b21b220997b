"""One run of one experiment: its result with everything that is needed to read it."""

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from manyhands.errors import UserError
from manyhands.lab.experiment import Description, Outcome
from manyhands.lab.job import Job
from manyhands.lab.registry import describe, find
from manyhands.plan.host import cpu_name, usable_cores
from manyhands.version import __version__


@dataclass(frozen=True, slots=True)
class Result:
    """What `lab run` prints, as JSON or for people."""

    name: str
    description: Description
    outcome: Outcome
    quick: bool
    seeds: tuple[int, ...]
    seconds: float
    machine: str
    threads: int
    quiet: bool
    """False: something else was using the processor, and times are no more than a hint."""

    @property
    def short_verdict(self) -> str:
        """reproduced, reproduced in part, not reproduced or not judged; of the direction alone where it was `quick`."""
        text = self.outcome.verdict
        return f"direction {text}" if self.quick and text != "not judged" else text

    @property
    def verdict(self) -> str:
        """In one sentence."""
        criteria = self.outcome.criteria
        judged = [criterion for criterion in criteria if criterion.held is not None]
        text = self.short_verdict
        if judged:
            text += f": {sum(c.held is True for c in judged)} of {len(judged)} criteria hold"
        if len(judged) < len(criteria):
            text += f", {len(criteria) - len(judged)} not judged"
        return f"{text}, at the quick size" if self.quick else text

    def described(self) -> dict[str, Any]:
        """Everything but pictures, as JSON."""
        from manyhands.inspect.findings import plain

        outcome = asdict(self.outcome)
        outcome.pop("drawings")
        for figure, made in zip(outcome["figures"], self.outcome.figures, strict=True):
            figure |= {"mean": made.mean, "range": made.range}
        told = {
            "experiment": self.name,
            **self.description.model_dump(mode="json", include={"question", "published", "source", "different"}),
            "quick": self.quick,
            "seeds": self.seeds,
            "seconds": self.seconds,
            "machine": self.machine,
            "threads": self.threads,
            "quiet": self.quiet,
            "version": __version__,
            **outcome,
            "passed": self.outcome.passed,
            "verdict": self.verdict,
        }
        return {key: plain(value) for key, value in told.items()}


def run_experiment(
    name: str,
    *,
    quick: bool = False,
    seeds: int | None = None,
    data: Path | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Result:
    """Run it. `seeds`: how many, from 0; None: as it says itself, one if `quick`.

    Raises `ConfigError` if there is no such experiment, `UserError` for data it does not take.
    """
    description = describe(name)
    if data is not None and description.data is None:
        raise UserError(f"--data: {name} takes none")
    run = find(name)
    import torch

    count = seeds or (1 if quick else description.seeds)
    with tempfile.TemporaryDirectory(prefix="manyhands-lab-") as scratch:
        job = Job(quick, tuple(range(count)), Path(scratch), data, note)
        began = time.perf_counter()
        outcome = run(job)
        seconds = time.perf_counter() - began
    machine = f"{cpu_name()}, {usable_cores()} cores"
    return Result(name, description, outcome, quick, job.seeds, seconds, machine, torch.get_num_threads(), job.quiet)
