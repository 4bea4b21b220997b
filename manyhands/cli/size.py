"""Sizes as people write them: 512MB, 2GiB."""

import re

from manyhands.errors import UserError

_UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 1 << 10,
    "mi": 1 << 20,
    "gi": 1 << 30,
    "ti": 1 << 40,
}
_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,9})?)\s*([kmgt]i?)?b?", re.IGNORECASE)


def size(flag: str, text: str | None) -> int | None:
    """Bytes; None for None. Raises `UserError` that names the flag."""
    if text is None:
        return None
    found = _SIZE.fullmatch(text.strip())
    count = int(float(found[1]) * _UNITS[(found[2] or "").lower()]) if found else 0
    if not 0 < count < 1 << 60:
        raise UserError(f"{flag} {text}: expected a size above 0, like 512MB or 2GiB")
    return count


def sold_size(flag: str, text: str | None) -> int | None:
    """Bytes of main memory as it is sold: 16GB are 16 GiB. Raises `UserError` that names the flag."""
    if text is not None and (found := _SIZE.fullmatch(text.strip())) and found[2] and len(found[2]) == 1:
        text = f"{found[1]}{found[2]}i"
    return size(flag, text)
