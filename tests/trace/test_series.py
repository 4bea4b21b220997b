import numpy as np
import pytest

from manyhands.trace.series import bin_mean, column, envelope, layer_column, layer_load, smooth


def test_columns_turn_null_and_missing_into_nan() -> None:
    steps = [{"loss": 1.0, "moe": {"3": {"max_vio": 0.5, "load": [0.25, 0.75]}}}, {"loss": None}, {}]
    assert np.array_equal(column(steps, "loss"), [1.0, np.nan, np.nan], equal_nan=True)
    assert np.array_equal(layer_column(steps, "3", "max_vio"), [0.5, np.nan, np.nan], equal_nan=True)
    assert layer_load(steps, "3").tolist() == [[0.5, 1.5]]


def test_bins_keep_the_mean_and_leave_nan_out() -> None:
    assert bin_mean(np.array([1.0, 3.0, np.nan, 5.0]), 2).tolist() == [2.0, 5.0]
    assert bin_mean(np.arange(12.0).reshape(6, 2), 3).tolist() == [[1, 2], [5, 6], [9, 10]]
    assert bin_mean(np.array([1.0, 2.0]), 5).tolist() == [1.0, 2.0]
    assert bin_mean(np.array([]), 5).tolist() == []


def test_the_envelope_keeps_a_single_spike() -> None:
    y = np.zeros(10_000)
    y[7_321] = 9.0
    x_short, y_short = envelope(np.arange(10_000.0), y, 100)
    assert len(x_short) == len(y_short) == 100 and y_short.max() == 9.0
    assert abs(x_short[y_short.argmax()] - 7_321) < 200


def test_smoothing_keeps_a_straight_line_and_skips_gaps() -> None:
    line = np.arange(50.0)
    assert smooth(line, 8) == pytest.approx(line)
    line[20] = np.nan
    assert np.isfinite(smooth(line, 8)).all() and smooth(line, 8)[20] == pytest.approx(20)
    assert len(smooth(np.array([]), 8)) == 0


def test_a_smoothed_curve_does_not_end_in_one_noisy_step() -> None:
    y = np.linspace(3.0, 2.0, 400)
    y[-1] += 1.0
    assert smooth(y, 10)[-1] < 2.5 and smooth(y, 20)[-1] < 2.25
    assert smooth(y[::-1], 20)[0] < 2.25
