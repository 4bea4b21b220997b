"""Numbers for people, and numbers from people."""

import pytest

from manyhands.errors import ConfigError
from manyhands.plan.report.numbers import length, quantity
from manyhands.plan.report.units import show


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [
        (671_026_404_352, "parameters", "671.0 B"),
        (1_026_408_209_408, "parameters", "1.026 T"),
        (512, "parameters", "512"),
        (93.72e9, "FLOP", "93.72 GFLOP"),
        (989.4e12, "FLOP/s", "989.4 TFLOP/s"),
        (70_272, "B", "70.27 kB"),
        (0, "B", "0 B"),
        (0.0021168, "s", "2.12 ms"),
        (5.2e6, "s", "60.19 days"),
        (7200, "s", "2 h"),
        (5.576e6, "USD", "5.576 M USD"),
        (12.5, "USD", "12.50 USD"),
        (0.0557, "USD", "0.0557 USD"),
        (0.9999, "share", "99.9%"),
        (1.0, "share", "100.0%"),
        (9.873, "x", "9.873x"),
        (1 / 9.873, "x", "1/9.873"),
        (8.000000000000002, "", "8"),
        (999_999_999, "parameters", "1 B"),
        (None, "tok/s", "–"),
        (float("inf"), "tok/s", "∞"),
    ],
)
def test_show(value: float | None, unit: str, expected: str) -> None:
    assert show(value, unit) == expected


def test_lengths_are_binary_and_quantities_decimal() -> None:
    assert (length("4k", ""), length("4096", ""), length("1M", "")) == (4096, 4096, 1 << 20)
    assert (quantity("14.8T", ""), quantity("1e20", ""), quantity("2.788M", "")) == (14.8e12, 1e20, 2.788e6)
    for wrong in ("", "-1", "0", "nan", "inf", "k", "1.5", "1e999", "4 096", "9" * 40, "4T"):
        with pytest.raises(ConfigError, match="--context"):
            length(wrong, "--context")
    for wrong in ("", "-1", "0", "nan", "inf", "T", "1e999", "1e41"):
        with pytest.raises(ConfigError, match="--tokens"):
            quantity(wrong, "--tokens")
