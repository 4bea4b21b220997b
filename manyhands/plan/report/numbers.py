"""Numbers as people write them on a command line: 128k tokens of context, 14.8T tokens of text, 1e20 FLOPs."""

import math
import re

from manyhands.errors import ConfigError

_FORM = re.compile(r"\s*([0-9][0-9_,]*\.?[0-9]*(?:[eE][+-]?[0-9]{1,3})?)\s*([kKMBGTP]?)\s*")
_DECIMAL = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12, "P": 1e15}


def quantity(text: str, what: str, low: float = 0.0, high: float = 1e40) -> float:
    """`14.8T` is 14.8e12. Raises `ConfigError` naming `what`."""
    match = _FORM.fullmatch(text)
    value = float(match[1].replace(",", "").replace("_", "")) * _DECIMAL[match[2]] if match else math.nan
    if not low < value <= high:
        raise ConfigError(f"{what} {text!r}: expected a number above {low:g} and up to {high:g}, such as 1e20 or 14.8T")
    return value


def length(text: str, what: str) -> int:
    """A number of positions; `4k` is 4096. Raises `ConfigError` naming `what`."""
    match = _FORM.fullmatch(text)
    scale = {"": 1, "k": 1 << 10, "K": 1 << 10, "M": 1 << 20}.get(match[2]) if match else None
    value = float(match[1].replace(",", "").replace("_", "")) * scale if match and scale else math.nan
    if not 1 <= value <= 1 << 30 or not float(value).is_integer():
        raise ConfigError(f"{what} {text!r}: expected a whole number of tokens, such as 4096, 32k or 1M")
    return int(value)
