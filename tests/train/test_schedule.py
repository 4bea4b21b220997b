"""The learning rate at hand-computed steps."""

import math

import pytest

from manyhands.config.run import ScheduleConfig
from manyhands.train.schedule import learning_rate


def rates(max_steps: int, **options: object) -> list[float]:
    config = ScheduleConfig.model_validate(options)
    return [learning_rate(step, max_steps, 2.0, config) for step in range(max_steps + 3)]


def test_wsd() -> None:
    got = rates(10, kind="wsd", warmup_steps=2, decay_fraction=0.4, min_ratio=0.5)
    assert got == pytest.approx([1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.75, 1.5, 1.25, 1.0, 1.0, 1.0])


def test_cosine() -> None:
    got = rates(6, kind="cosine", warmup_steps=2, min_ratio=0.1)
    half = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(5)]
    assert got == pytest.approx([1.0, 2.0, *(2 * h for h in half), 0.2, 0.2])
    assert got[4] == pytest.approx(1.1)


@pytest.mark.parametrize("kind", ["wsd", "cosine"])
@pytest.mark.parametrize("max_steps", [1, 2, 7, 50])
@pytest.mark.parametrize("warmup", [0, 1, 7, 50, 1000])
@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_positive_and_bounded_everywhere(kind: str, max_steps: int, warmup: int, fraction: float) -> None:
    got = rates(max_steps, kind=kind, warmup_steps=warmup, decay_fraction=fraction, min_ratio=0.0)
    assert all(0 < rate <= 2.0 for rate in got[:max_steps]), got
    assert got[max_steps:] == [0.0] * 3
    assert max(got) == 2.0, "the peak is reached, however short the run"


def test_warmup_longer_than_the_run() -> None:
    assert rates(4, warmup_steps=1000)[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])


def test_decay_does_not_begin_before_the_warmup_ends() -> None:
    got = rates(10, kind="wsd", warmup_steps=5, decay_fraction=0.9)
    assert got[:11] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0, 2.0, 1.6, 1.2, 0.8, 0.4, 0.0])
