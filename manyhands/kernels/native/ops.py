"""The kernels as operators of torch: what they compute on a CPU, their shapes for tracing, their gradients.

`experts` takes stacked weights; `packed_experts` takes records of any format, which are constants: gradients go to x
and to the router's weights. `hidden` is what the activation was applied to, in the order of the sorted pairs, kept for
the backward pass and empty where none will come.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from manyhands.config.packing import FORMATS
from manyhands.errors import ConfigError
from manyhands.kernels.eager import eager
from manyhands.kernels.experts import ExpertWeights
from manyhands.kernels.native import calls
from manyhands.kernels.twice import gradients_through
from manyhands.quant import Layout, expert_layout, linear_layout

_ROUTED = "Tensor x, Tensor ids, Tensor weights, Tensor kept"
_STACKED = "Tensor up, Tensor down, Tensor? up_bias, Tensor? down_bias, str activation"
_PACKED = "Tensor records, int[] sizes, str activation"
_RUN = "int level, int threads"
_SCHEMAS = (
    f"experts({_ROUTED}, {_STACKED}, bool save, {_RUN}) -> (Tensor, Tensor)",
    f"experts_backward(Tensor dy, {_ROUTED}, {_STACKED}, Tensor hidden, bool[] wanted, {_RUN})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    f"packed_experts({_ROUTED}, {_PACKED}, bool save, {_RUN}) -> (Tensor, Tensor)",
    f"packed_experts_backward(Tensor dy, {_ROUTED}, {_PACKED}, Tensor hidden, bool[] wanted, {_RUN})"
    " -> (Tensor, Tensor)",
    f"packed_linear(Tensor x, Tensor record, int[] sizes, {_RUN}) -> Tensor",
)
_INPUTS = {"experts": (0, 2, 4, 5, 6, 7), "packed_experts": (0, 2)}
"""Which inputs have a gradient, in the order in which the backward operator returns them."""


def sizes_of(layout: Layout) -> list[int]:
    """A layout as the integers an operator takes: widths, format, group size, gated, bias."""
    first = layout.matrices[0]
    format = FORMATS.index(first.format)
    return [first.outputs, first.inputs, format, first.group_size, int(first.parts == 2), int(layout.bias)]


@lru_cache(maxsize=1024)
def _layout(sizes: tuple[int, ...], activation: str | None) -> Layout:
    if len(sizes) != 6 or not 0 <= sizes[2] < len(FORMATS) or min(sizes) < 0:
        raise ConfigError(f"native kernels: {sizes} are not the sizes of a packed layout")
    outputs, inputs, format, group, gated, bias = sizes
    if activation is None:
        return linear_layout(outputs, inputs, FORMATS[format], group, bias=bool(bias))
    return expert_layout(inputs, outputs, activation, FORMATS[format], group, gated=bool(gated), bias=bool(bias))


Pair = tuple[Tensor, Tensor]


def experts(
    x: Tensor, ids: Tensor, weights: Tensor, kept: Tensor,
    up: Tensor, down: Tensor, up_bias: Tensor | None, down_bias: Tensor | None, activation: str,
    save: bool, level: int, threads: int,
) -> Pair:  # fmt: skip
    """The operator `experts` on a CPU: y and `hidden`."""
    e = calls.Experts.from_weights(ExpertWeights(up, down, up_bias, down_bias, activation), x.dtype)
    return calls.forward(x, ids, weights, kept, e, save=save, level=level, threads=threads)


def _experts_backward(
    dy: Tensor, x: Tensor, ids: Tensor, weights: Tensor, kept: Tensor,
    up: Tensor, down: Tensor, up_bias: Tensor | None, down_bias: Tensor | None, activation: str,
    hidden: Tensor, wanted: list[bool], level: int, threads: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    e = calls.Experts.from_weights(ExpertWeights(up, down, up_bias, down_bias, activation), x.dtype)
    return calls.backward(dy, x, ids, weights, kept, e, hidden=hidden, wanted=wanted, level=level, threads=threads)


def packed_experts(
    x: Tensor, ids: Tensor, weights: Tensor, kept: Tensor,
    records: Tensor, sizes: list[int], activation: str,
    save: bool, level: int, threads: int,
) -> Pair:  # fmt: skip
    """The operator `packed_experts` on a CPU: y and `hidden`."""
    e = calls.Experts.from_records(records, _layout(tuple(sizes), activation))
    return calls.forward(x, ids, weights, kept, e, save=save, level=level, threads=threads)


def _packed_experts_backward(
    dy: Tensor, x: Tensor, ids: Tensor, weights: Tensor, kept: Tensor,
    records: Tensor, sizes: list[int], activation: str,
    hidden: Tensor, wanted: list[bool], level: int, threads: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    e = calls.Experts.from_records(records, _layout(tuple(sizes), activation))
    all_wanted = [*wanted, *[False] * 4]  # the weights are constants
    found = calls.backward(dy, x, ids, weights, kept, e, hidden=hidden, wanted=all_wanted, level=level, threads=threads)
    return found[:2]


def packed_linear(x: Tensor, record: Tensor, sizes: list[int], level: int, threads: int) -> Tensor:
    """The operator `packed_linear` on a CPU."""
    return calls.linear(x, record, _layout(tuple(sizes), None), level, threads)


def _fake_forward(x: Tensor, ids: Tensor, F: int, gated: bool, save: bool) -> Pair:
    width = (2 if gated else 1) * (-(-F // 16) * 16)
    return x.new_empty(x.shape), x.new_empty(ids.numel() if save else 0, width, dtype=torch.float32)


def _fake_experts(
    x: Tensor, ids: Tensor, weights: Tensor, kept: Tensor,
    up: Tensor, down: Tensor, up_bias: Tensor | None, down_bias: Tensor | None, activation: str,
    save: bool, level: int, threads: int,
) -> Pair:  # fmt: skip
    return _fake_forward(x, ids, down.shape[2], up.shape[1] == 2 * down.shape[2], save)


def _fake_packed(
    x: Tensor, ids: Tensor, weights: Tensor, kept: Tensor,
    records: Tensor, sizes: list[int], activation: str,
    save: bool, level: int, threads: int,
) -> Pair:  # fmt: skip
    return _fake_forward(x, ids, sizes[0], bool(sizes[4]), save)


def _fake_gradients(x: Tensor, others: list[Tensor | None], wanted: list[bool]) -> tuple[Tensor, ...]:
    shapes = [t.shape if want and t is not None else (0,) for t, want in zip(others, wanted[1:], strict=True)]
    dx = x.new_empty(x.shape if wanted[0] else (0,))
    return dx, *(x.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _fake_experts_backward(
    dy: Tensor, x: Tensor, ids: Tensor, weights: Tensor, kept: Tensor,
    up: Tensor, down: Tensor, up_bias: Tensor | None, down_bias: Tensor | None, activation: str,
    hidden: Tensor, wanted: list[bool], level: int, threads: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    return _fake_gradients(x, [weights, up, down, up_bias, down_bias], wanted)


def _fake_packed_backward(
    dy: Tensor, x: Tensor, ids: Tensor, weights: Tensor, kept: Tensor,
    records: Tensor, sizes: list[int], activation: str,
    hidden: Tensor, wanted: list[bool], level: int, threads: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    return _fake_gradients(x, [weights], wanted)


def _fake_linear(x: Tensor, record: Tensor, sizes: list[int], level: int, threads: int) -> Tensor:
    return x.new_empty(x.shape[0], sizes[0])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.places = [i for i, a in enumerate(inputs) if isinstance(a, Tensor)]
    ctx.save_for_backward(*(inputs[i] for i in ctx.places), output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.inputs = [None if isinstance(a, Tensor) else a for a in inputs]


def _twice(name: str, inputs: list[Any], wanted: list[bool], dy: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients as functions that have gradients: through `eager`."""
    if name != "experts":
        raise ConfigError("packed experts have no second derivatives: their kernels' gradient is a constant")
    x, ids, weights, kept, up, down, up_bias, down_bias, activation = inputs[:9]

    def reference(x: Tensor, weights: Tensor, up: Tensor, down: Tensor, b1: Tensor | None, b2: Tensor | None) -> Tensor:
        return eager(x, ids, weights, kept, ExpertWeights(up, down, b1, b2, activation))

    found = gradients_through(reference, [x, weights, up, down, up_bias, down_bias], wanted, dy)
    out: list[Tensor | None] = [None] * len(inputs)
    for place, gradient in zip(_INPUTS[name], found, strict=True):
        out[place] = gradient
    return tuple(out)


def _autograd(name: str) -> Callable[..., Any]:
    """The gradients of operator `name`, whose last inputs are (save, level, threads): from its backward operator."""
    places = _INPUTS[name]

    def gradients(ctx: Any, dy: Tensor | None, _dhidden: None) -> tuple[Tensor | None, ...]:
        out: list[Tensor | None] = [None] * len(ctx.inputs)
        if dy is None:
            return tuple(out)
        *tensors, hidden = ctx.saved_tensors
        inputs = list(ctx.inputs)
        for place, tensor in zip(ctx.places, tensors, strict=True):
            inputs[place] = tensor
        wanted = [ctx.needs_input_grad[i] for i in places]
        if torch.is_grad_enabled():  # create_graph: the kernels' own gradient has none
            return _twice(name, inputs, wanted, dy)
        found = getattr(torch.ops.manyhands, f"{name}_backward")(dy, *inputs[:-3], hidden, wanted, *inputs[-2:])
        for place, gradient, want in zip(places, found, wanted, strict=True):
            if want:
                out[place] = gradient.to(inputs[place].dtype)
        return tuple(out)

    return gradients


def _register() -> Any:
    library: Any = torch.library.Library("manyhands", "DEF")  # type: ignore[no-untyped-call]
    for schema in _SCHEMAS:
        library.define(schema)
    for name, cpu, fake in (
        ("experts", experts, _fake_experts),
        ("experts_backward", _experts_backward, _fake_experts_backward),
        ("packed_experts", packed_experts, _fake_packed),
        ("packed_experts_backward", _packed_experts_backward, _fake_packed_backward),
        ("packed_linear", packed_linear, _fake_linear),
    ):
        library.impl(name, cpu, "CPU")
        torch.library.register_fake(f"manyhands::{name}", fake, lib=library)
    for name in _INPUTS:
        torch.library.register_autograd(f"manyhands::{name}", _autograd(name), setup_context=_setup, lib=library)
    return library


_LIBRARY = _register()  # the operators live as long as this does
