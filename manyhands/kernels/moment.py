"""Whether this is an ordinary moment: nobody traces, transforms, watches or casts what is computed.

A fast path computes outside PyTorch's sight. In any other moment it would be computed past somebody, silently, so it
stands back; and what is made in such a moment is never kept.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as modules

_interpreter = torch._C._functorch.peek_interpreter_stack
_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_tracing = torch._C._get_tracing_state

_exact = ContextVar("exact", default=False)


def is_exact() -> bool:
    """Whether every row is to have the same bits however many rows are computed with it (`exactly`)."""
    return _exact.get()


@contextmanager
def exactly(exact: bool = True) -> Iterator[None]:
    """Inside, products of float weights take one order of sums for any number of rows, natively.

    Whoever asks for it puts the whole pass inside, the head too; `False` leaves it as it is.
    """
    token = _exact.set(exact or _exact.get())
    try:
        yield
    finally:
        _exact.reset(token)


def transformed() -> bool:
    """Whether a transform of `torch.func` (grad, vmap, jvp, …) or forward-mode differentiation is under way."""
    if torch.compiler.is_compiling():  # which has its own ways, and cannot trace the rest
        return False
    return _interpreter() is not None or forward_ad._current_level >= 0


def ordinary() -> bool:
    """Whether a computation may leave PyTorch: not while tracing, transforming, in a mode (fake tensors, a counter of
    operators) or in `torch.autocast`."""
    return (
        not torch.compiler.is_compiling()  # first: the rest cannot be traced
        and _interpreter() is None
        and not _dispatch_modes()
        and not _function_modes()
        and _tracing() is None
        and forward_ad._current_level < 0
        and not torch.is_autocast_enabled("cpu")
    )


def unheard(module: nn.Module) -> bool:
    """Whether calling `module` is calling its class's `forward`: no hooks, its own or global, and no other method."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or "forward" in module.__dict__
        or modules._global_forward_hooks
        or modules._global_forward_pre_hooks
    )


def held(module: nn.Module, *names: str) -> bool:
    """Whether these tensors are the module's own parameters and buffers, or None.

    A parametrization makes one for each look at it: whoever points into that points into memory that is given back.
    """
    own = (module._parameters, module._buffers)
    return all(any(name in d for d in own) or vars(module).get(name, module) is None for name in names)


def in_autocast(x: Tensor) -> Tensor:
    """`x` as PyTorch's products would take it: in the lower precision inside `torch.autocast`, else as it is."""
    if (
        x.device.type != "meta"
        and torch.is_autocast_enabled(x.device.type)
        and x.dtype in (torch.float32, torch.float16, torch.bfloat16)
    ):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x
