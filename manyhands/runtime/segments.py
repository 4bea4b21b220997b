"""What a program is made of: native calls, and calls of modules between them.

B rows of one token each, D model width.
"""

from collections.abc import Callable, Sequence
from ctypes import Array
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from manyhands.kernels.native import library, views
from manyhands.kernels.native.library import CStep
from manyhands.layers.attention import Caches, Positions
from manyhands.layers.cache import Cache
from manyhands.moe import MoELayer, Routing


@dataclass(slots=True)
class Moment:
    """What one step gives to the modules that are called in it."""

    dtype: torch.dtype
    positions: Positions
    caches: Sequence[Cache]
    real_1B: Tensor
    ids_1B: Tensor
    routings: dict[int, Routing] = field(default_factory=dict)
    """What the called modules routed, by layer."""

    def layer(self, number: int) -> Caches:
        """The caches of a layer: one, or one for each row."""
        layers = [cache.layers[number] for cache in self.caches]
        return layers if self.positions.rows else layers[0]


class Segment(Protocol):
    """A stretch of the program."""

    def run(self, moment: Moment) -> None:
        """From buffers into buffers."""


class Native:
    """Calls of the native library, made as one."""

    def __init__(self, steps: Sequence[CStep]) -> None:
        self.calls: Array[CStep] = (CStep * len(steps))(*steps)

    def run(self, moment: Moment) -> None:
        """One call."""
        library.call("mh_steps", self.calls, len(self.calls), views.run(-1, 0))


@dataclass(slots=True)
class Call:
    """A module between two buffers [B, D] float32; it sees [1, B, D] in the compute dtype, and its hooks are heard."""

    module: Any
    source: Tensor
    to: Tensor
    through: Callable[[Any, Tensor, Moment], Tensor]

    def run(self, moment: Moment) -> None:
        """Call it."""
        self.to.copy_(self.through(self.module, self.source[None].to(moment.dtype, copy=True), moment)[0])


def call_plain(module: nn.Module, x_1BD: Tensor, moment: Moment) -> Tensor:
    """A norm, a dense feed-forward network."""
    y: Tensor = module(x_1BD)
    return y


def call_attention(layer: int) -> Callable[[Any, Tensor, Moment], Tensor]:
    """An attention module."""

    def through(module: Any, x_1BD: Tensor, moment: Moment) -> Tensor:
        y: Tensor = module(x_1BD, moment.positions, moment.layer(layer))[0]
        return y

    return through


def call_mlp(layer: int) -> Callable[[Any, Tensor, Moment], Tensor]:
    """A feed-forward network or a mixture, as a block calls it."""

    def through(module: Any, x_1BD: Tensor, moment: Moment) -> Tensor:
        if not isinstance(module, MoELayer):
            return call_plain(module, x_1BD, moment)
        y, moment.routings[layer] = module(x_1BD, moment.real_1B, moment.ids_1B, False)
        return y

    return through


def call_block(layer: int) -> Callable[[Any, Tensor, Moment], Tensor]:
    """A whole block."""

    def through(module: Any, x_1BD: Tensor, moment: Moment) -> Tensor:
        x: Tensor
        x, routing, _ = module(x_1BD, moment.positions, moment.layer(layer), moment.real_1B, moment.ids_1B, False)
        if routing is not None:
            moment.routings[layer] = routing
        return x

    return through
