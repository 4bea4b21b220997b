"""Random numbers of tensors that several processes share out: those that one process would have drawn."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from manyhands.parallel.shards import held_rows, local, put

_DRAWN = 1 << 20  # elements drawn at a time
_VECTOR = 16  # normal numbers are made in blocks of so many: cut between them, a CPU's stream is the same


class DrawnWhole(TorchFunctionMode):
    """Inside, whatever fills a sharded tensor gives it its rows of what one process would have given the whole.

    Every process draws all numbers, a few at a time, and keeps its own: none ever holds a whole stack of experts.
    """

    def __torch_function__(self, func: Any, types: Iterable[Any], args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensor = args[0] if args else None
        if isinstance(tensor, DTensor):
            assert func is not Tensor.__setitem__, "a slice of a sharded tensor is a copy: fill it by copy_"
            if func in (Tensor.normal_, Tensor.uniform_):
                _draw(tensor, lambda part: func(part, *args[1:], **kwargs))
                return tensor
            if func is Tensor.copy_ and not isinstance(args[1], DTensor):
                put(tensor, args[1])
                return tensor
        return func(*args, **kwargs)


def _draw(tensor: DTensor, fill: Any) -> None:
    """Let `fill` draw the whole tensor, in parts of whole rows where that changes no number."""
    mine, own = local(tensor.detach()), held_rows(tensor)
    assert own is not None
    row = tensor.shape[1:].numel() if tensor.numel() else 0
    if not row:
        return
    together = tensor.device.type != "cpu" or row % _VECTOR or tensor.dtype != torch.float32
    size = len(tensor) if together else max(1, _DRAWN // row)
    for first in range(0, len(tensor), size):
        part = mine.new_empty(min(size, len(tensor) - first), *tensor.shape[1:])
        fill(part)
        low, high = max(first, own.start), min(first + len(part), own.stop)
        if low < high:
            mine[low - own.start : high - own.start].copy_(part[low - first : high - first])
