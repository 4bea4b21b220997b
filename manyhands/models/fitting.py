"""Arrays in, a curve out: what the models of numbers share.

N examples, I inputs, O outputs.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from manyhands.errors import ConfigError, DataError, UserError

Array = Any
"""A tensor, a numpy array or nested lists, [N, …] or, of one column, [N]."""


@dataclass(frozen=True, slots=True)
class History:
    """How a fit went. Entry 0 of each is before the first epoch."""

    objective: tuple[float, ...]
    """What is optimised, per example."""
    error: tuple[float, ...]
    """Mean squared error of the mixture's output, over examples and outputs."""
    valid_error: tuple[float, ...] = ()
    """The same on examples that are not fitted, if there are any."""

    @property
    def epochs(self) -> int:
        """How many there were."""
        return len(self.objective) - 1


@dataclass(frozen=True, slots=True)
class Mixed:
    """What a mixture of numbers returns. K experts."""

    mean: Tensor
    """[N, O]: the experts' outputs, weighed."""
    outputs: Tensor
    """[N, K, O]: each expert's own."""
    log_gates: Tensor
    """[N, K]: log of the probability with which the gate chooses each expert."""

    @property
    def gates(self) -> Tensor:
        """[N, K]: they sum to 1."""
        return self.log_gates.exp()


class NumberRegressor(nn.Module):
    """Inputs are shifted and scaled as those of the first fit were, so that their units do not matter."""

    input_mean: Tensor
    input_scale: Tensor

    def __init__(self, num_inputs: int, num_outputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_inputs, self.num_outputs = num_inputs, num_outputs
        self.register_buffer("input_mean", torch.zeros(num_inputs, dtype=dtype))
        self.register_buffer("input_scale", torch.ones(num_inputs, dtype=dtype))

    def forward(self, x: Array) -> Mixed:
        """x [N, I]: a tensor, an array or lists. Raises `DataError` for another shape."""
        return self.mix(self.inputs(x))

    if TYPE_CHECKING:
        __call__ = forward  # so that calls are typed

    def mix(self, x1_NI: Tensor) -> Mixed:
        """What `forward` returns, for inputs that are scaled and have their column of ones."""
        raise NotImplementedError

    @torch.no_grad()
    def predict(self, x: Array) -> Tensor:
        """[N, O]: the mean."""
        return self.forward(x).mean

    def inputs(self, x: Array) -> Tensor:
        """[N, I+1] scaled, with a column of ones: the last column of every weight matrix is its bias."""
        scaled = (as_columns(x, self.num_inputs, "x", self.input_mean) - self.input_mean) / self.input_scale
        return torch.cat((scaled, scaled.new_ones(len(scaled), 1)), 1)

    def targets(self, y: Array, examples: int) -> Tensor:
        """[N, O]. Raises `DataError` unless there is one for each example."""
        found = as_columns(y, self.num_outputs, "y", self.input_mean)
        if len(found) != examples:
            raise DataError(f"x has {examples} rows and y has {len(found)}")
        return found

    def pair(self, x: Array, y: Array) -> tuple[Tensor, Tensor]:
        """Inputs and targets as the two methods above give them."""
        x1_NI = self.inputs(x)
        return x1_NI, self.targets(y, len(x1_NI))

    @torch.no_grad()
    def take_scale(self, x: Array) -> None:
        """Mean and standard deviation of the inputs; a column that is constant is only shifted."""
        found = as_columns(x, self.num_inputs, "x", self.input_mean)
        deviation = found.std(0, correction=0)
        self.input_mean.copy_(found.mean(0))
        self.input_scale.copy_(torch.where(deviation > 0, deviation, torch.ones_like(deviation)))


def as_columns(values: Array, columns: int, name: str, like: Tensor) -> Tensor:
    """[N, columns] in the dtype and on the device of `like`. Raises `DataError` naming what is wrong."""
    try:
        found = torch.as_tensor(values).to(like.device, like.dtype)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{name} is no array of numbers: {str(error)[:200]}") from None
    if found.dim() == 1 and columns == 1:
        found = found[:, None]
    if found.dim() != 2 or found.shape[1] != columns or not len(found):
        raise DataError(f"{name} is {list(found.shape)}, not [examples, {columns}] with at least one example")
    if not bool(found.isfinite().all()):
        raise DataError(f"{name} holds NaN or infinity")
    return found


def mean_squared(output_NO: Tensor, target_NO: Tensor) -> float:
    """Over examples and outputs."""
    return float((output_NO.detach() - target_NO).square().mean())


def descend(
    parameters: Sequence[nn.Parameter],
    evaluate: Callable[[], tuple[Tensor, Tensor]],
    target_NO: Tensor,
    *,
    step: float,
    epochs: int,
    until: float | None = None,
    valid: Callable[[], float] | None = None,
) -> History:
    """Gradient descent with a fixed step, every epoch on all examples. `evaluate` returns what is minimised and the
    outputs [N, O]; `valid` an error on other examples.

    It ends after `epochs`, or as soon as the mean squared error is below `until`. Raises `ConfigError` for a step or a
    number of epochs that cannot be, and `UserError` if the step was so large that the objective is no number any more.
    """
    if not step > 0 or epochs < 0:
        raise ConfigError(f"step = {step}, epochs = {epochs}: a step is above 0 and epochs are at least 0")
    objectives, errors, valid_errors = list[float](), list[float](), list[float]()
    for epoch in range(epochs + 1):
        loss, output_NO = evaluate()
        objectives.append(float(loss.detach()))
        errors.append(mean_squared(output_NO, target_NO))
        if valid is not None:
            valid_errors.append(valid())
        if not math.isfinite(objectives[-1]):
            raise UserError(f"step = {step:g} is too large: after {epoch} epochs the objective is {objectives[-1]}")
        if epoch == epochs or (until is not None and errors[-1] < until):
            break
        gradients = torch.autograd.grad(loss, list(parameters))
        with torch.no_grad():
            for p, g in zip(parameters, gradients, strict=True):
                p.sub_(g, alpha=step)
    return History(tuple(objectives), tuple(errors), tuple(valid_errors))


def first_below(values: Sequence[float], bound: float) -> int | None:
    """The first epoch at which a curve is below `bound`; None if it never is."""
    return next((epoch for epoch, value in enumerate(values) if value < bound), None)
