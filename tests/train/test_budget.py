"""A time budget: what the machine does for a while must not decide the whole run."""

from collections.abc import Callable

import pytest

from manyhands.train.budget import Budget


def run(seconds: float, step_seconds: Callable[[int], float], closing: float = 0.0) -> tuple[int, float, list[int]]:
    """Steps taken, time at the end, and the plans, of a run whose step s takes `step_seconds(s)`."""
    budget, step, wall, max_steps, plans = Budget(seconds, False, closing), 0, 0.0, 900, list[int]()
    while step < max_steps:
        took = step_seconds(step)
        step, wall = step + 1, wall + took
        total = budget.steps(took, step=step, max_steps=max_steps, trained=wall, wall=wall)
        if total is not None:
            max_steps = total
            plans.append(total)
    return step, wall, plans


def test_a_quiet_machine_needs_one_plan() -> None:
    steps, wall, plans = run(175, lambda s: 0.18 * (1 + 0.1 * (s % 3)))
    assert len(plans) == 1 and wall == pytest.approx(175, rel=0.1) and steps == plans[0]


@pytest.mark.parametrize("slow", [range(12), range(20), range(100, 115), range(10, 14)])
def test_a_slow_while_costs_that_while(slow: range) -> None:
    steps, wall, plans = run(175, lambda s: 0.6 * (9 if s in slow else 1))
    lost = 0.6 * 8 * len(slow)
    assert wall == pytest.approx(175, rel=0.12)
    assert steps == pytest.approx(max(0.0, 175 - lost) / 0.6, rel=0.15, abs=12)
    assert len(plans) <= 8


@pytest.mark.parametrize("after", [0.2, 5.0])
def test_a_machine_that_stays_slower_or_faster_ends_in_time(after: float) -> None:
    _, wall, _ = run(175, lambda s: 0.6 if s < 100 else 0.6 * after)
    assert wall == pytest.approx(175, rel=0.15)


def test_steps_that_are_long_beside_the_budget() -> None:
    assert run(60, lambda s: 20.0)[:2] == (3, 60.0)
    assert run(5, lambda s: 20.0)[0] == 1
    assert run(60, lambda s: 2.0, closing=5)[0] == 25  # ten seconds are kept for validation
