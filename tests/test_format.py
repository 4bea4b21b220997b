"""Numbers for people, character for character, and the version, which stands once."""

import re
from pathlib import Path

import pytest

import manyhands
from manyhands.format import compact, duration, number, rounded, show


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (812, "812"),
        (5912, "5.9k"),
        (999_960, "1M"),
        (9_312_000, "9.31M"),
        (42_000_000, "42M"),
        (1.2e9, "1.2B"),
    ],
)
def test_compact(value: float, text: str) -> None:
    assert compact(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(7.6, "8s"), (59.7, "1m00s"), (125, "2m05s"), (11_220, "3h07m"), (187_200, "2d04h")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_number() -> None:
    assert [number(v, 2) for v in (1.239, None, float("nan"))] == ["1.24", "–", "–"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(812, "812"), (12_345, "12.3K"), (789e6, "789M"), (37.55e9, "37.5B"), (671_026_404_352, "671B"), (1e12, "1T")],
)
def test_rounded(value: float, text: str) -> None:
    assert rounded(value) == text


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


def test_the_version_stands_in_one_file() -> None:
    package = Path(manyhands.__file__).parent
    stated = [file for file in package.rglob("*.py") if re.search(r"^__version__ *=", file.read_text(), re.M)]
    assert stated == [package / "version.py"]
    assert 'dynamic = ["version"]' in (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert manyhands.__version__.count(".") == 2
