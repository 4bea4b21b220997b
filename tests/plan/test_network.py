"""α + β·bytes: what was put in comes out, and small sizes are heard."""

import pytest

from manyhands.config import parse
from manyhands.errors import ConfigError
from manyhands.plan.network import Network, fitted


def test_an_exact_line_is_found() -> None:
    network = Network(latency=40e-6, bandwidth=3e9)
    samples = [(size, network.seconds(size)) for size in (1e4, 1e6, 1e7)]
    assert fitted(samples) == pytest.approx((40e-6, 3e9))
    assert network.seconds(3e6, collectives=3) == pytest.approx(3 * 40e-6 + 1e-3)


def test_small_sizes_are_heard() -> None:
    """A twentieth more at the largest size moves α by less than a tenth."""
    line = Network(latency=100e-6, bandwidth=1e9)
    sizes = (1e3, 1e5, 1e6)
    samples = [(size, line.seconds(size) * (1.05 if size == 1e6 else 1.0)) for size in sizes]
    alpha, bandwidth = fitted(samples)
    assert alpha == pytest.approx(100e-6, rel=0.1) and bandwidth == pytest.approx(1e9, rel=0.06)


def test_latency_is_not_below_zero() -> None:
    alpha, bandwidth = fitted([(1e6, 0.9e-3), (2e6, 2.0e-3), (4e6, 4.4e-3)])
    assert alpha == 0.0 and bandwidth == pytest.approx(1e9, rel=0.15)


def test_what_no_line_fits_says_so() -> None:
    with pytest.raises(ValueError, match="one size"):
        fitted([(1e6, 1e-3), (1e6, 1.1e-3)])
    with pytest.raises(ValueError, match="did not take longer"):
        fitted([(1e3, 1e-3), (1e6, 1e-4)])


def test_a_file_of_something_else_is_refused() -> None:
    with pytest.raises(ConfigError, match="bandwidth"):
        parse(Network, {"format": "manyhands network", "latency": 1e-5, "bandwidth": -1.0}, "net.json")
