"""Spikes are counted, and a spread is held against chance."""

import math

import numpy as np
import pytest

from manyhands.errors import UserError
from manyhands.lab.steady import BEFORE, SPIKE, spikes, variance_test


def test_a_spike_stands_above_the_median_of_the_steps_before_it() -> None:
    calm = [1.0, 1.1] * BEFORE
    assert spikes(calm) == 0
    calm[BEFORE + 3] = SPIKE * 1.1 + 0.01
    assert spikes(calm) == 1
    calm[2] = 100.0  # no steps before it to judge by
    assert spikes(calm) == 1
    assert spikes([*calm, math.nan, math.inf]) == 3
    assert spikes(calm[:BEFORE]) == 0


def test_the_variance_test_has_the_level_it_says() -> None:
    rng = np.random.default_rng(1)
    alike = [variance_test(a, b, 2000) for a, b in rng.standard_normal((300, 2, 5)).tolist()]
    assert 0.02 < np.mean(np.array(alike) < 0.05) < 0.09
    assert variance_test([0.0, 10.0, -10.0, 5.0, -5.0], [0.0, 0.1, -0.1, 0.05, -0.05]) < 0.001
    assert variance_test([0.0, 1.0, -1.0], [0.0, 1.0, -1.0]) == pytest.approx(0.5, abs=0.02)
    # F(4, 4) is above 6.388 once in twenty (any table of the F distribution)
    narrow, wide = [-1.0, -1.0, 0.0, 1.0, 1.0], math.sqrt(6.388)
    assert variance_test([wide * x for x in narrow], narrow) == pytest.approx(0.05, abs=0.01)
    with pytest.raises(UserError, match="two seeds"):
        variance_test([1.0], [1.0, 2.0])
