"""Figures of one arm stand together."""

from manyhands.lab.arms import by_arm
from manyhands.lab.experiment import Figure


def test_figures_are_grouped_by_arm_and_keep_their_order_in_it() -> None:
    made = [Figure(name, arm, (0.0,)) for name in ("loss", "time") for arm in ("", "b", "a")]
    assert [(f.arm, f.name) for f in by_arm(made, ("a", "b"))] == [
        ("a", "loss"), ("a", "time"), ("b", "loss"), ("b", "time"), ("", "loss"), ("", "time"),
    ]  # fmt: skip
