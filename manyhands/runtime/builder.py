"""The native calls of a program, one behind the other, while claims write them.

T rows, a token each, of at most `capacity`. A buffer is [capacity, width] float32 with a name; a layer uses what the
layer before it used.
"""

from collections.abc import Sequence
from ctypes import Array, Structure, addressof, c_void_p
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manyhands.kernels.native import step, views
from manyhands.kernels.native.library import CCache, CRotation, CRouting, CRows, CSequences, CStep
from manyhands.runtime.reroute import Biases
from manyhands.runtime.segments import Native, Segment

NORM, LINEARS, ROPE_AND_CACHE, ATTEND, ROUTE, EXPERTS, ADD, ACTIVATE, LATENT_PRODUCTS, LATENT_ROPE_AND_CACHE, FETCH = (
    range(11)
)


Argument = Structure | Array[Any] | int | None
"""What a call is given: by address, or the address itself."""


class Unfit(Exception):
    """A part that no claim covers, and why."""


def step_of(kind: int, *arguments: Argument, n: tuple[int, int] = (0, 0), factor: float = 1.0) -> CStep:
    """A call, whose arguments must live as long."""
    places = [a if a is None or isinstance(a, int) else addressof(a) for a in arguments]
    return CStep(kind, (c_void_p * (CStep.a.size // 8))(*places), n, factor)


@dataclass(frozen=True, slots=True)
class Claimed:
    """A layer whose attention is native: its structure, which is filled before a step, and what is kept in blocks."""

    layer: int
    cache: CCache
    kinds: tuple[tuple[int, int], ...]
    """Heads and width of each tensor that is cached."""
    values: int | None
    """Of the one tensor that latent attention caches, so many first numbers of a key are its value; else None."""

    def bind(self, buffers: Sequence[Tensor]) -> None:
        """Point to blocks [N, G, P, d] of each tensor."""
        step.bind_cache(self.cache, buffers[0], buffers[-1][..., : self.values])


class Builder:
    """Collects segments, the memory that they point to, and what each step must bind anew."""

    def __init__(self, capacity: int, config: Any, editable: bool = False) -> None:
        self.capacity, self.config, self.editable = capacity, config, editable
        self.D: int = config.hidden_size
        self.segments: list[Segment] = []
        self.copies: list[Tensor] = []
        """Float32 copies that every step makes again, of `sources`."""
        self.sources: list[Tensor] = []
        self.attentions: list[Claimed] = []
        self.biases: dict[int, Biases] = {}
        """Where routing may be edited: of the claimed routers, by layer."""
        self.held: list[Any] = []  # what the calls point to must live as long
        self.tensors: dict[tuple[str, int], Tensor] = {}
        self.routings: dict[int, int] = {}
        """Claimed sparse layers, and where in `routed` each one's routing is."""
        self.routed: tuple[Tensor, ...] = ()
        """Ids, weights, scores, logits of all of them, [sparse layers, capacity · ·]: a layer's T rows lie together."""
        self.cos, self.sin = (torch.empty(capacity, config.rope_dim // 2) for _ in range(2))
        self.most = capacity
        """Rows up to which the native calls are the fastest way; with more they are the exact way, up to `capacity`."""
        self.fetches = False
        """Whether experts are brought into memory: modules would make float weights of them, however many rows."""
        self.sequences = CSequences()
        """Who the rows are: every call reads it."""
        self._rows: dict[tuple[str, int], CRows] = {}
        self._routed: list[CRouting] = []
        self._rotations: list[CRotation] = []
        self._steps: list[CStep] = []

    def buffer(self, name: str, width: int) -> CRows:
        """The structure for a buffer."""
        if (name, width) not in self._rows:
            self.tensors[name, width] = torch.empty(self.capacity, width)
            self._rows[name, width] = views.rows(self.tensors[name, width])
        return self._rows[name, width]

    def tensor(self, name: str, width: int) -> Tensor:
        """The buffer itself."""
        self.buffer(name, width)
        return self.tensors[name, width]

    def count(self, T: int) -> None:
        """From now on the rows are T."""
        for rows in self._rows.values():
            rows.count = T
        for routing in self._routed:
            routing.tokens = T
        for rotation in self._rotations:
            rotation.positions = T

    def float32(self, tensor: Tensor | None, width: int) -> int | None:
        """Where `tensor` [width] lies as float32: itself, or a copy that every step makes again."""
        if tensor is None:
            return None
        if not views.plain(tensor, 1) or tensor.shape[0] != width:
            raise Unfit("a vector that does not lie as the kernels read it")
        source = tensor.detach()
        if source.dtype != torch.float32:
            self.sources.append(source)
            self.copies.append(source.float())
            source = self.copies[-1]
        return source.data_ptr()

    def call(self, kind: int, *arguments: Argument, n: tuple[int, int] = (0, 0), factor: float = 1.0) -> None:
        """One native call."""
        self.held.extend(arguments)
        for argument in arguments:
            if isinstance(argument, CRouting):
                self._routed.append(argument)
            elif isinstance(argument, CRotation):
                self._rotations.append(argument)
        self._steps.append(step_of(kind, *arguments, n=n, factor=factor))

    def attention(self, layer: int, cache: CCache, *kinds: tuple[int, int], values: int | None = None) -> None:
        """The calls before and after this one place keys and values in a cache and attend to it."""
        self.attentions.append(Claimed(layer, cache, kinds, values))

    def routing(self, layer: int, E: int, K: int) -> list[Tensor]:
        """Where a claimed layer's ids [T, K], weights [T, K], scores and logits [T, E] go."""
        sparse = self.config.sparse_layers
        if not self.routed:
            floats = [torch.empty(len(sparse), self.capacity, n) for n in (K, E, E)]
            self.routed = (torch.empty(len(sparse), self.capacity, K, dtype=torch.int64), *floats)
        if layer not in sparse or (self.routed[0].shape[2], self.routed[2].shape[2]) != (K, E):
            raise Unfit("a router of other sizes than the config's")
        self.routings[layer] = list(sparse).index(layer)
        return [t[self.routings[layer]] for t in self.routed]

    def add(self, factor: float = 1.0, gate: CRows | None = None, to: str = "x", source: str = "y") -> None:
        """to += factor · gate · source."""
        self.call(ADD, self.buffer(to, self.D), self.buffer(source, self.D), gate, factor=factor)

    def module(self, segment: Segment) -> None:
        """A part that is called as the module it is."""
        self.flush()
        self.segments.append(segment)

    def flush(self) -> None:
        """End the native segment."""
        if self._steps:
            self.segments.append(Native(self._steps))
            self._steps = []

    @property
    def _written(self) -> tuple[list[Any], ...]:
        lists = (self._steps, self.copies, self.sources, self.attentions, self.held, self.segments)
        return (*lists, self._routed, self._rotations)

    def mark(self) -> tuple[int, ...]:
        """Where the builder is, for `reset`."""
        if self.editable:  # a part may then end segments, and those are its own
            self.flush()
        return tuple(len(written) for written in self._written)

    def reset(self, mark: tuple[int, ...]) -> None:
        """Forget what was written since."""
        for written, n in zip(self._written, mark, strict=True):
            del written[n:]
