"""Adafactor for parameters whose rows lie on several processes: torch's formula, its means taken over all of them.

torch's own computes no mean of a tensor that is cut. What it adds up here (the squares of a parameter and of its
update, of a matrix also those in each column) is added up over the processes, in one exchange before the update is
known and one after; everything else concerns rows, which lie here.

Letters: G gradient, R and C mean squares of its rows and columns, n × m a matrix, or each of a stack of them.
Source: arXiv 1804.04235; the form of torch.optim.Adafactor, which says where the two differ.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from manyhands.parallel.shards import laid_out, local, sum_over_shards_


class ShardedAdafactor(torch.optim.Optimizer):
    """torch's Adafactor (`beta2_decay` −0.8, `d` 1) of DTensors cut along their first dimension, or of plain tensors.

    The state is torch's: `step`, and `row_var` and `col_var` or, of a vector, `variance`. All but `step` and the
    `col_var` of a matrix, which every process has whole, lie as the parameter does.
    """

    def __init__(self, params: Iterable[Any], lr: float, eps: tuple[float, float], weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay, "beta2_decay": -0.8, "d": 1.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Apply one update to every parameter that has a gradient; on all processes to the same ones. Collective."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    if not state:
                        state.update(_fresh(p))
                    _update(p, p.grad, state, group)


def state_shapes(p: Tensor) -> dict[str, torch.Size]:
    """The state of a parameter."""
    if p.ndim < 2:
        return {"step": torch.Size(), "variance": p.shape}
    *stack, rows, columns = p.shape
    return {"step": torch.Size(), "row_var": torch.Size([*stack, rows, 1]), "col_var": torch.Size([*stack, 1, columns])}


def lies_like(p: Tensor, slot: str) -> bool:
    """Whether `slot` of the state is cut as the parameter is."""
    return slot != "step" and not (slot == "col_var" and p.ndim == 2)


def _fresh(p: Tensor) -> dict[str, Tensor]:
    held = local(p)
    state = {"step": torch.tensor(0.0)}
    for slot, shape in state_shapes(p).items():
        if slot != "step":
            cut = lies_like(p, slot)
            zeros = held.new_zeros([len(held), *shape[1:]] if cut else shape)
            state[slot] = laid_out(zeros, p, shape) if cut else zeros
    return state


def _update(p: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
    weight, G = local(p), local(grad)
    state["step"] += 1
    step, (least, least_rms) = float(state["step"]), group["eps"]
    new = step ** group["beta2_decay"]
    sums = [weight.square().sum().view(1)]
    matrix = p.ndim == 2
    if p.ndim > 1:
        R, C = local(state["row_var"]), local(state["col_var"])
        R.lerp_(G.square().mean(-1, keepdim=True), new)
        if matrix:
            sums += [R.sum().view(1), G.square().sum(0)]
        else:
            C.lerp_(G.square().mean(-2, keepdim=True), new)
    total = sum_over_shards_(torch.cat(sums), p)
    rate = max(least_rms, (float(total[0]) / p.numel()) ** 0.5) * min(group["lr"], step**-0.5)
    if p.ndim > 1:
        if matrix:
            C.lerp_((total[2:] / p.shape[0])[None], new)
        rows = (total[1] / p.shape[0]).view(1, 1) if matrix else R.mean(-2, keepdim=True)
        variance = (R @ C).div_(rows.clamp(min=least))
    else:
        variance = local(state["variance"]).lerp_(G.square(), new).clone()
    update = variance.clamp_(min=least * least).rsqrt_().mul_(G)
    rms = (float(sum_over_shards_(update.square().sum(), p)) / p.numel()) ** 0.5
    weight.mul_(1 - group["lr"] * group["weight_decay"])
    weight.add_(update, alpha=-rate / max(1.0, rms / group["d"]))
