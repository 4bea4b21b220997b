import base64
import re
import zlib
from itertools import pairwise

import numpy as np
import pytest

from manyhands.trace.charts import Line, line_chart, tick_text, ticks
from manyhands.trace.heat import load_chart


@pytest.mark.parametrize(("low", "high"), [(0, 1), (1.3, 5.6), (0, 3e-4), (-2, 2), (0, 123_456), (2.0, 2.0), (0, 0)])
def test_ticks_cover_the_range_and_are_few(low: float, high: float) -> None:
    found = ticks(low, high, 5)
    assert found[0] <= low + 1e-12 and found[-1] >= high - 1e-12 and 2 <= len(found) <= 8
    assert np.allclose(np.diff(found), found[1] - found[0])


@pytest.mark.parametrize(("low", "high"), [(0, 3e-14), (1e-14, 1e-14), (3.0, 3.0 + 1e-15), (5e5, 5e5 + 1e-10)])
def test_ticks_of_next_to_nothing_are_apart(low: float, high: float) -> None:
    found = ticks(low, high, 5)
    assert found[0] <= low < found[-1] and all(a < b for a, b in pairwise(found))
    chart = line_chart([Line("a", np.array([0.0, 1.0]), np.array([low, high]))], "y")
    assert "nan" not in chart.lower() and "inf" not in chart.lower()


def test_tick_text() -> None:
    assert [tick_text(v) for v in (0, 0.001, 2.5, 8000, 20_000, 3e6)] == ["0", "0.001", "2.5", "8000", "20k", "3M"]


def test_a_line_lies_where_its_values_are() -> None:
    chart = line_chart([Line("a", np.array([0.0, 10.0]), np.array([0.0, 4.0]))], "y", y_from_zero=True)
    assert 'class="line" style="stroke:var(--c0)" d="M0.0 1000.0L1000.0 0.0"' in chart


def test_gaps_are_left_out_and_nothing_is_said_to_be_nothing() -> None:
    x = np.array([1.0, 2.0, 3.0])
    assert "nan" not in line_chart([Line("a", x, np.array([1.0, np.nan, 2.0]))], "y").lower()
    assert "Nothing recorded" in line_chart([Line("a", x, x * np.nan)], "y")


def test_what_lies_below_zero_is_seen_in_a_chart_that_starts_there() -> None:
    chart = line_chart([Line("a", np.array([0.0, 10.0]), np.array([-1.0, 4.0]))], "y", y_from_zero=True)
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ (-?[\d.]+)", chart.split('class="line"')[1])]
    assert heights and max(heights) <= 1000


def test_a_point_alone_is_a_dot_and_there_is_no_step_and_a_half() -> None:
    chart = line_chart([Line("a", np.array([1.0]), np.array([0.0004]))], "y")
    assert 'class="dots"' in chart and re.findall(r'class="x"[^>]*>([^<]*)<', chart) == ["1", "2"]
    assert "--left:6ch" in chart, "room for 0.0004"


def test_reference_labels_do_not_overlap() -> None:
    x = np.array([0.0, 1.0])
    chart = line_chart([Line("a", x, x)], "y", references={"one": 0.50, "two": 0.505, "three": 0.51}, height=150)
    tops = [float(t) for t in re.findall(r'class="reflabel" style="top:([\d.]+)%', chart)]
    assert len(tops) == 3 and min(np.diff(tops)) >= 9.99


def test_the_heat_map_holds_the_load() -> None:
    load_CE = np.array([[0.0, 1.0, 2.0], [0.5, 1.0, 5.0]])
    chart = load_chart(load_CE, np.array([0.0, 1.0, 2.0]), 3, (1, 9))
    image = base64.b64decode(re.search(r"base64,([^\"]+)", chart)[1])  # type: ignore[index]
    data = image[image.index(b"IDAT") + 4 :]
    rows = zlib.decompressobj().decompress(data)
    assert list(rows) == [0, 0, 16, 0, 31, 31, 0, 61, 61]  # a filter byte, then one level per step
    assert 'data-levels="0GVVz' in chart
    bars = dict(re.findall(r'class="bar(\w+)" d="([^"]*)"', chart))
    assert [bars[kind].count("M") for kind in ("fair", "over", "dead")] == [1, 1, 1]
