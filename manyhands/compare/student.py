"""Quantiles of Student's t for any number of degrees of freedom, whole or not."""

import math

_TOO_SMALL = 1e-300


def two_sided(level: float, df: float) -> float:
    """What |t| stays below with probability `level`: 4.303 for 0.95 and two degrees of freedom."""
    if not (0 < level < 1 and df > 0):
        raise ValueError(f"level {level}, {df} degrees of freedom")
    low, high = 0.0, 1.0
    while _outside(high, df) > 1 - level:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        if _outside(middle, df) > 1 - level:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _outside(t: float, df: float) -> float:
    """P(|T| > t) = I_x(df/2, 1/2) at x = df / (df + t²)."""
    if math.isinf(df):
        return math.erfc(t / math.sqrt(2))
    x = df / (df + t * t)
    return _incomplete_beta(df / 2, 0.5, x)


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """I_x(a, b), by its continued fraction (Abramowitz & Stegun 26.5.8), on the side where that converges fast."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(b, a, 1 - x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    value, c, d = 1.0, 1.0, 1 - (a + b) * x / (a + 1)
    d = 1 / (d if abs(d) > _TOO_SMALL else _TOO_SMALL)
    value = d
    for m in range(1, 1000):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d, c = 1 + term * d, 1 + term / c
            d = 1 / (d if abs(d) > _TOO_SMALL else _TOO_SMALL)
            c = c if abs(c) > _TOO_SMALL else _TOO_SMALL
            value *= c * d
        if abs(c * d - 1) < 1e-14:
            break
    return front * value / a
