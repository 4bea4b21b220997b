"""Products with weights that are constants: they are got for the product, got again for its gradient, never kept.

A packed layer, or one in another dtype than its input, is thus trained through with one matrix unpacked at a time.
Autograd's own product would keep the unpacked weights of all layers until the backward pass.

N rows, sorted by matrix; `ends[i]` is one past the last row of matrix i.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from manyhands.kernels.moment import transformed

Fetch = Callable[[int], tuple[Tensor, Tensor | None]]
"""Matrix i [out, in], in any float dtype, and its bias [out]."""


class _Product(torch.autograd.Function):
    """x·Wᵀ + b, or x·W where `back`. It is linear, so that its gradient is itself the other way round, without b."""

    @staticmethod
    def forward(ctx: Any, x_N: Tensor, fetch: Fetch, ends: Sequence[int], width: int, back: bool) -> Tensor:
        ctx.how = (fetch, ends, x_N.shape[1], back)
        y_N, start = x_N.new_zeros(x_N.shape[0], width), 0
        for i, end in enumerate(ends):
            if end > start:
                weight, bias = fetch(i)
                weight = weight.detach().to(x_N.dtype)
                torch.mm(x_N[start:end], weight if back else weight.T, out=y_N[start:end])
                if bias is not None:
                    y_N[start:end] += bias.detach().to(x_N.dtype)
            start = end
        return y_N

    @staticmethod
    def backward(ctx: Any, dy_N: Tensor) -> tuple[Tensor, None, None, None, None]:
        fetch, ends, width, back = ctx.how
        dx_N: Tensor = _Product.apply(dy_N, _without_bias(fetch), ends, width, not back)  # type: ignore[no-untyped-call]
        return dx_N, None, None, None, None


def _without_bias(fetch: Fetch) -> Fetch:
    return lambda i: (fetch(i)[0], None)


def frozen_products(x_N: Tensor, fetch: Fetch, ends: Sequence[int], width: int) -> Tensor:
    """[N, in] -> [N, `width`]: the rows of each matrix times it, plus its bias. A gradient goes to x alone."""
    y: Tensor = _Product.apply(x_N, fetch, ends, width, False)  # type: ignore[no-untyped-call]
    return y


def frozen_product(x: Tensor, fetch: Callable[[], tuple[Tensor, Tensor | None]], width: int) -> Tensor:
    """[..., in] -> [..., `width`]: the same for one matrix."""
    rows = x.reshape(-1, x.shape[-1])
    return frozen_products(rows, lambda _: fetch(), (rows.shape[0],), width).view(*x.shape[:-1], width)


def keeps_for_backward(x: Tensor) -> bool:
    """Whether a product of x would keep its weights until a gradient comes, and these functions need not."""
    kept = torch.is_grad_enabled() and x.requires_grad and x.device.type != "meta"
    return kept and not torch.compiler.is_compiling() and not transformed()
