"""Keys and values: bytes per token and per sequence."""

from manyhands.plan.compute import seen
from manyhands.plan.sizes import Sizes


def cache_bytes_per_token(sizes: Sizes, bits: float = 16) -> tuple[float, float]:
    """(in the layers that see everything, in those with a sliding window: these stop growing at the window)."""
    each = sizes.kv_values * bits / 8
    windowed = sum(window is not None for window in sizes.windows)
    return each * (len(sizes.windows) - windowed), each * windowed


def sequence_bytes(sizes: Sizes, context: float, bits: float = 16) -> float:
    """Of one sequence of `context` positions; also what decoding its next token reads."""
    return sum(sizes.kv_values * bits / 8 * seen(context, window) for window in sizes.windows)
