"""Numbers with units, for people: 671.0 B parameters, 93.72 GFLOP, 673.1 GB, 2.12 ms. B is 10^9, a GB 10^9 bytes."""

import math

_SI = ((1e24, "Y"), (1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_COUNT = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
_TIME = ((3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))


def show(value: float | None, unit: str) -> str:
    """`value` in four significant digits. Units: parameters, tokens, B, B/s, FLOP, FLOP/s, s, tok/s, USD, share, …"""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞"
    if unit in ("parameters", "tokens"):
        return scaled(value, _COUNT)
    if unit in ("B", "B/s", "FLOP", "FLOP/s"):
        return scaled(value, _SI, " ") + unit
    if unit == "s":
        return _seconds(value)
    if unit == "tok/s":
        return f"{digits(value)} tok/s"
    if unit == "USD":
        return (
            f"{scaled(value, _COUNT)} USD"
            if value >= 1e5
            else f"{value:,.2f} USD"
            if value >= 0.995
            else f"{value:.3g} USD"
        )
    if unit == "share":
        return f"{value:.1%}" if value < 0.9995 or value >= 1 else "99.9%"
    if unit == "x":
        return f"{digits(value)}x" if value >= 1 else f"1/{digits(1 / value)}"
    return f"{digits(value)} {unit}".rstrip()


def scaled(value: float, steps: tuple[tuple[float, str], ...], gap: str = " ") -> str:
    """Four significant digits and the letter of the scale."""
    for size, letter in steps:
        if abs(value) >= size * 0.99995:
            return f"{digits(value / size)}{gap}{letter}"
    return f"{digits(value)}{gap if gap and steps is _SI else ''}"


def digits(value: float) -> str:
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
        return f"{digits(value / 86400)} days"
    for size, name in _TIME:
        if value >= size:
            return f"{value / size:.3g} {name}"
    return f"{value:.2e} s"
