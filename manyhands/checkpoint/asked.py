"""The dtype and the device that a caller names: as torch's own values, or as the text one writes."""

import torch

from manyhands.errors import UserError

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}


def asked_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """`"bfloat16"` is `torch.bfloat16`; `"auto"` and None: as stored. Raises `UserError` for what weights cannot be."""
    if dtype is None or dtype == "auto":
        return None
    found = _DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if found not in _DTYPES.values():
        raise UserError(f"dtype = {dtype!r}: allowed are {', '.join(_DTYPES)} (as text too), and auto: as stored")
    return found


def asked_device(device: torch.device | str) -> torch.device:
    """A device that is here. Raises `UserError` for a name there is none of, and for a GPU PyTorch does not see."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise UserError(f"device = {device!r}: there is no such device; cpu, cuda and cuda:0 are") from None
    if found.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise UserError(f"device = {str(found)!r}: PyTorch finds no CUDA device here; use cpu")
        if found.index is not None and found.index >= count:
            raise UserError(f"device = {str(found)!r}: PyTorch finds {count} here, the last is cuda:{count - 1}")
    return found
