"""Numbers as people write them on a command line."""

import pytest

from manyhands.errors import ConfigError
from manyhands.plan.report.numbers import length, quantity


def test_lengths_are_binary_and_quantities_decimal() -> None:
    assert (length("4k", ""), length("4096", ""), length("1M", "")) == (4096, 4096, 1 << 20)
    assert (quantity("14.8T", ""), quantity("1e20", ""), quantity("2.788M", "")) == (14.8e12, 1e20, 2.788e6)
    for wrong in ("", "-1", "0", "nan", "inf", "k", "1.5", "1e999", "4 096", "9" * 40, "4T"):
        with pytest.raises(ConfigError, match="--context"):
            length(wrong, "--context")
    for wrong in ("", "-1", "0", "nan", "inf", "T", "1e999", "1e41"):
        with pytest.raises(ConfigError, match="--tokens"):
            quantity(wrong, "--tokens")
