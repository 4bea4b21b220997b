"""Numbers for people: on the screen, in plans and in reports.

    compact     5.9k, 9.31M     where there is room for four digits
    rounded     37.6B, 671B     a table's three
    duration    2m05s           how long something took or will take
    number      1.24, –         a figure that may be missing
    show        671.0 B, 93.72 GFLOP, 673.1 GB, 2.12 ms    with its unit
    table       columns under their heads

B is 10^9, a GB 10^9 bytes.
"""

import math
from collections.abc import Iterator, Sequence

_COUNT = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
_SI = ((1e24, "Y"), (1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_TIME = ((3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
NONE = "–"
"""Where there is no number."""


def compact(value: float) -> str:
    """A count in at most four digits: 812, 5.9k, 42k, 9.31M, 1.2B."""
    for size, unit in _COUNT:
        if abs(value) >= size * 0.9995:
            scaled = value / size
            digits = 0 if abs(scaled) >= 99.95 else 1 if abs(scaled) >= 9.995 or unit == "k" else 2
            text = f"{scaled:.{digits}f}"
            return (text.rstrip("0").rstrip(".") if "." in text else text) + unit
    return f"{value:.4g}"


def rounded(value: float) -> str:
    """Three digits, and more of whole numbers: 671B, 37.6B, 789M, 12K."""
    for size, unit in _COUNT:
        if value >= size:
            scaled = value / size
            return (f"{scaled:.0f}" if scaled >= 100 else f"{scaled:.3g}") + unit.upper()
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    """8s, 2m05s, 3h07m, 2d04h."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def number(value: float | None, digits: int = 3) -> str:
    """`value` with `digits` decimals, or a dash where there is none."""
    return NONE if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def show(value: float | None, unit: str) -> str:
    """`value` in four significant digits. Units: parameters, tokens, B, B/s, FLOP, FLOP/s, s, tok/s, USD, share, …"""
    if value is None or math.isnan(value):
        return NONE
    if math.isinf(value):
        return "∞"
    if unit in ("parameters", "tokens"):
        return _scaled(value, _COUNT)
    if unit in ("B", "B/s", "FLOP", "FLOP/s"):
        return _scaled(value, _SI) + unit
    if unit == "s":
        return _seconds(value)
    if unit == "tok/s":
        return f"{_digits(value)} tok/s"
    if unit == "USD":
        return (
            f"{_scaled(value, _COUNT)} USD"
            if value >= 1e5
            else f"{value:,.2f} USD"
            if value >= 0.995
            else f"{value:.3g} USD"
        )
    if unit == "share":
        return f"{value:.1%}" if value < 0.9995 or value >= 1 else "99.9%"
    if unit == "x":
        return f"{_digits(value)}x" if value >= 1 else f"1/{_digits(1 / value)}"
    return f"{_digits(value)} {unit}".rstrip()


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> Iterator[str]:
    """Columns under their heads; those in `left`, and the last, are aligned to the left. Empty columns are left out."""
    kept = [i for i in range(len(head)) if any(row[i] for row in rows)]
    widths = {i: max(len(head[i]), *(len(row[i]) for row in rows)) for i in kept}
    for row in [head, *rows] if any(head[i] for i in kept) else rows:
        cells = (row[i].ljust(widths[i]) if i in left or i == len(head) - 1 else row[i].rjust(widths[i]) for i in kept)
        yield "  ".join(cells).rstrip()


def _scaled(value: float, steps: tuple[tuple[float, str], ...]) -> str:
    """Four significant digits and the letter of the scale; small bytes and FLOP still have the gap to their unit."""
    for size, letter in steps:
        if abs(value) >= size * 0.99995:
            return f"{_digits(value / size)} {letter}"
    return f"{_digits(value)}{' ' if steps is _SI else ''}"


def _digits(value: float) -> str:
    """Four significant digits, whole numbers in full, a comma for thousands."""
    if value == 0:
        return "0"
    if abs(value) < 1e6 and abs(value - round(value)) <= 1e-9 * abs(value):
        return f"{round(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e15 else f"{value:.4g}"
    if abs(value) < 1e-3:
        return f"{value:.3g}"
    places = max(0, 3 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(places, 4)}f}"


def _seconds(value: float) -> str:
    if value == 0:
        return "0 s"
    if value >= 48 * 3600:
        return f"{_digits(value / 86400)} days"
    for size, name in _TIME:
        if value >= size:
            return f"{value / size:.3g} {name}"
    return f"{value:.2e} s"
