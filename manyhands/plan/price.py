"""Money: of a million tokens, and of training. Prices are the user's; nothing here knows a market."""

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
