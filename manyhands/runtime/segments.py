"""What a program is made of: native calls, and calls of modules between them.

T rows, a token each, of one sequence or several, one behind the other; D model width.
"""

from collections.abc import Callable, Sequence
from ctypes import Array
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from manyhands.config import ModelConfig
from manyhands.kernels.native import library, views
from manyhands.kernels.native.library import CStep
from manyhands.layers.attention import Caches, Positions
from manyhands.layers.cache import Cache
from manyhands.models.decoder import find_positions, find_rows
from manyhands.moe import MoELayer, Routing
from manyhands.moe.edit import Edit, Edits


@dataclass
class Moment:
    """What one step gives to the modules that are called in it."""

    config: ModelConfig
    dtype: torch.dtype
    ids_1T: Tensor
    counts: Sequence[int]
    """Tokens of each sequence."""
    caches: Sequence[Cache]
    """One for each; it has made room."""
    real: Sequence[Tensor | None]
    """Of each sequence, which positions are no padding; None: all."""
    routings: dict[int, Routing] = field(default_factory=dict)
    """What the called modules routed, by layer."""
    edits: Edits = field(default_factory=dict)
    """What layers are told of their routing; of a replay, the rows of these tokens."""
    kept: dict[int, Tensor] = field(default_factory=dict)
    """[T, K] of the native layers in which an edit may leave pairs out."""

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.ids_1T.shape[1]

    @cached_property
    def positions(self) -> Positions:
        """Where the rows are: of a ragged batch, or of one sequence."""
        lengths, device = [cache.length for cache in self.caches], self.ids_1T.device
        if len(lengths) == 1:
            return find_positions(self.config, self.counts[0], lengths[0], self.real[0], device)
        return find_rows(self.config, self.counts, lengths, self.real, device)

    @cached_property
    def real_1T(self) -> Tensor:
        """No row is padding."""
        return torch.ones_like(self.ids_1T, dtype=torch.bool)

    def edited(self, layer: int) -> tuple[Edit, ...]:
        """A layer's edit as its last argument, if it has one: modules that somebody wrote need not know of it."""
        return (self.edits[layer],) if layer in self.edits else ()

    def layer(self, number: int) -> Caches:
        """The caches of a layer: one, or one for each sequence."""
        layers = [cache.layers[number] for cache in self.caches]
        return layers if len(layers) > 1 else layers[0]


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
        self.make()

    def make(self) -> None:
        """The same, where there is no moment."""
        library.call("mh_steps", self.calls, len(self.calls), views.run(-1, 0))


@dataclass(slots=True)
class Call:
    """A module between two buffers, of T rows float32; it sees [1, T, D] in the compute dtype, its hooks are heard."""

    module: Any
    source: Tensor
    to: Tensor
    through: Callable[[Any, Tensor, Moment], Tensor]

    def run(self, moment: Moment) -> None:
        """Call it."""
        T = moment.num_tokens
        self.to[:T].copy_(self.through(self.module, self.source[None, :T].to(moment.dtype, copy=True), moment)[0])


def call_plain(module: nn.Module, x_1TD: Tensor, moment: Moment) -> Tensor:
    """A norm, a dense feed-forward network."""
    y: Tensor = module(x_1TD)
    return y


def call_attention(layer: int) -> Callable[[Any, Tensor, Moment], Tensor]:
    """An attention module."""

    def through(module: Any, x_1TD: Tensor, moment: Moment) -> Tensor:
        y: Tensor = module(x_1TD, moment.positions, moment.layer(layer))[0]
        return y

    return through


def call_mlp(layer: int) -> Callable[[Any, Tensor, Moment], Tensor]:
    """A feed-forward network or a mixture, as a block calls it."""

    def through(module: Any, x_1TD: Tensor, moment: Moment) -> Tensor:
        if not isinstance(module, MoELayer):
            return call_plain(module, x_1TD, moment)
        y, moment.routings[layer] = module(x_1TD, moment.real_1T, moment.ids_1T, False, *moment.edited(layer))
        return y

    return through


def call_block(layer: int) -> Callable[[Any, Tensor, Moment], Tensor]:
    """A whole block."""

    def through(module: Any, x_1TD: Tensor, moment: Moment) -> Tensor:
        x: Tensor
        x, routing, _ = module(
            x_1TD, moment.positions, moment.layer(layer), moment.real_1T, moment.ids_1T, False, *moment.edited(layer)
        )
        if routing is not None:
            moment.routings[layer] = routing
        return x

    return through
