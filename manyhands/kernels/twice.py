"""Gradients of gradients. Hand-written backward passes have none: where one is asked for (`create_graph`), the gradient
is taken through the same function in PyTorch's own operators instead. (`once_differentiable` does not see it where the
incoming gradient is a constant, and the answer is wrong without a word.)
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def gradients_through(
    reference: Callable[..., Tensor], inputs: Sequence[Tensor | None], wanted: Sequence[bool], dy: Tensor
) -> list[Tensor | None]:
    """The gradients of `reference(*inputs)` that are wanted, as functions of the inputs and of dy.

    Taken at aliases: one input may have been computed from another (the router's weights from x), and the partial
    gradient at x must not hold the way through them, which the caller's graph takes itself.
    """
    with torch.enable_grad():
        aliases = [None if t is None else t.view_as(t) for t in inputs]
        y = reference(*aliases)
        chosen = [t for t, want in zip(aliases, wanted, strict=True) if want and t is not None]
        found = iter(torch.autograd.grad(y, chosen, dy.to(y.dtype), create_graph=True, allow_unused=True))
    return [next(found) if want and t is not None else None for t, want in zip(inputs, wanted, strict=True)]
