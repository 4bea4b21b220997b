"""Several arms, each trained with every seed of the job."""

from collections.abc import Iterable, Mapping

from manyhands.config import RunConfig
from manyhands.lab.experiment import Figure
from manyhands.lab.job import Job
from manyhands.lab.language import Trained, changed, train_arm


def train_arms(job: Job, runs: Mapping[str, RunConfig]) -> dict[str, list[Trained]]:
    """By name, one `Trained` per seed; seed by seed, so that a run cut short has compared something."""
    trained: dict[str, list[Trained]] = {name: [] for name in runs}
    for seed in job.seeds:
        for name, run in runs.items():
            trained[name].append(train_arm(job, changed(run, f"train.seed={seed}"), f"{name}, seed {seed}"))
    return trained


def by_arm(figures: Iterable[Figure], names: Iterable[str]) -> tuple[Figure, ...]:
    """The figures of one arm together, arms in the order of `names`; what is of none of them comes last."""
    place = {name: i for i, name in enumerate(names)}
    return tuple(sorted(figures, key=lambda figure: place.get(figure.arm, len(place))))
