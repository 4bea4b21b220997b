"""Learning curves and their ratio."""

import pytest

from manyhands.errors import UserError
from manyhands.lab.curves import Progress, ratios, smoothed


def course(losses: list[float], every: int = 1, seconds: float = 2.0) -> Progress:
    steps = [every * (i + 1) for i in range(len(losses))]
    return Progress(steps, [seconds * step for step in steps], losses)


def test_a_curve_twice_as_steep_is_twice_as_soon() -> None:
    slow = course([10.0 - step for step in range(1, 9)])
    fast = course([10.0 - 2 * step for step in range(1, 9)], seconds=3.0)
    found = ratios(slow, fast)
    assert [(ratio.loss, ratio.slow_step, ratio.fast_step) for ratio in found] == [
        (10.0 - s, s, s / 2) for s in range(2, 9)
    ]
    assert all(ratio.by_steps == 2.0 for ratio in found)
    assert all(ratio.by_clock == pytest.approx(2 * 2.0 / 3.0, rel=1e-15) for ratio in found)


def test_of_a_curve_and_itself_it_is_one() -> None:
    curve = course([5.0, 4.0, 4.5, 3.0, 3.2, 2.0])
    assert [(r.loss, r.by_steps, r.by_clock) for r in ratios(curve, curve)] == [
        (v, 1.0, 1.0) for v in (5.0, 4.0, 3.0, 2.0)
    ]


def test_only_losses_that_both_have() -> None:
    assert [r.loss for r in ratios(course([9.0, 6.0, 4.0, 2.0]), course([7.0, 3.0]))] == [6.0, 4.0]
    assert ratios(course([3.0, 2.0]), course([9.0, 8.0])) == []


def test_the_first_time_counts_and_straight_lines_between() -> None:
    [found] = ratios(course([4.0, 5.0]), course([6.0, 5.0, 5.5, 3.0], every=10))
    assert found.fast_step == 35.0  # from the best so far, 5.0, which 5.5 at 30 does not undo, to 3.0 at 40
    assert found.slow_step == 1


def test_smoothing_is_a_trailing_mean() -> None:
    found = smoothed(course([1.0, 3.0, 5.0, 9.0]), 2)
    assert (list(found.steps), list(found.seconds)) == ([2, 3, 4], [4.0, 6.0, 8.0])
    assert found.losses == pytest.approx([2.0, 4.0, 7.0], rel=1e-15)
    with pytest.raises(UserError, match="3 points are fewer than a window of 4"):
        smoothed(course([1.0, 2.0, 3.0]), 4)
