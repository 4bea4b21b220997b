"""Money: of a million tokens, and of training. Prices are the user's; nothing here knows a market."""

import math
from dataclasses import dataclass

from manyhands.errors import ConfigError

SECONDS_PER_HOUR = 3600.0


def price_per_million(price_per_hour: float, tokens_per_second: float) -> float:
    """Of 10^6 tokens on a machine of `price_per_hour`, busy all the time: P / 3600 / (tokens/s) · 10^6."""
    return price_per_hour / SECONDS_PER_HOUR / tokens_per_second * 1e6


def device_hours(flops: float, rate: float, utilisation: float) -> float:
    """Hours of one device: FLOP / (rate · utilisation) / 3600."""
    return flops / (rate * utilisation) / SECONDS_PER_HOUR


def utilisation(flops: float, rate: float, hours: float) -> float:
    """The share of the matrix rate that so many device hours amount to (MFU, arXiv 2204.02311 appendix B)."""
    return flops / (rate * hours * SECONDS_PER_HOUR)


@dataclass(frozen=True, slots=True)
class ApiPrice:
    """What a seller charges, USD for 10^6 tokens."""

    input: float
    output: float
    cached: float
    """Of input that the seller has seen before; the input's price where there is no other."""


def read_api_price(text: str) -> ApiPrice:
    """`IN/OUT` or `IN/CACHED/OUT`: 0.27/0.07/1.10. Raises `ConfigError`."""
    wanted = f"--api-price {text}: expected IN/OUT or IN/CACHED/OUT in USD for 10^6 tokens, like 0.27/0.07/1.10"
    try:
        numbers = [float(part) for part in text.split("/")]
    except ValueError:
        raise ConfigError(wanted) from None
    if len(numbers) not in (2, 3) or not all(math.isfinite(n) and 0 <= n < 1e6 for n in numbers) or not numbers[-1]:
        raise ConfigError(wanted)
    return ApiPrice(numbers[0], numbers[-1], numbers[1] if len(numbers) == 3 else numbers[0])


def blended(price: ApiPrice, ratio: float, cached: float) -> float:
    """Of 10^6 tokens, `ratio` in to one out, a share `cached` of the input seen before."""
    return (ratio * ((1 - cached) * price.input + cached * price.cached) + price.output) / (ratio + 1)
