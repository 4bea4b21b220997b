"""The C++ experts (`native/`): what loads them and makes them operators of torch.

Start with `backend.py`. Nothing here is needed to use the other backends, and nothing is compiled at run time.
"""

from manyhands.kernels.native.backend import Native
from manyhands.kernels.native.library import NativeError, available, levels, missing
from manyhands.kernels.native.packed import linear, packed_experts

__all__ = ["Native", "NativeError", "available", "levels", "linear", "missing", "packed_experts"]
