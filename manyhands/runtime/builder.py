"""The native calls of a program, one behind the other, while claims write them.

B rows of one token each. A buffer is [B, width] float32 with a name; a layer uses what the layer before it used.
"""

from ctypes import Array, Structure, addressof, c_void_p
from typing import Any

import torch
from torch import Tensor

from manyhands.kernels.native import step, views
from manyhands.kernels.native.library import CCache, CRows, CStep
from manyhands.runtime.segments import Native, Segment

NORM, LINEARS, ROPE_AND_CACHE, ATTEND, ROUTE, EXPERTS, ADD, ACTIVATE = range(8)


class Unfit(Exception):
    """A part that no claim covers, and why."""


class Builder:
    """Collects segments, the memory that they point to, and what each step must bind anew."""

    def __init__(self, B: int, config: Any) -> None:
        self.B, self.config = B, config
        self.D: int = config.hidden_size
        self.segments: list[Segment] = []
        self.copies: list[Tensor] = []
        """Float32 copies that every step makes again, of `sources`."""
        self.sources: list[Tensor] = []
        self.attentions: list[tuple[int, int, CCache]] = []
        """Per claimed layer and row: layer, row, cache."""
        self.first, self.start = (torch.zeros(B, dtype=torch.int64) for _ in range(2))
        """The position of each row's token, and how many at the head of its sequence are padding."""
        one = torch.tensor([0, 1])
        rows = [step.Sequences(one, self.first[i : i + 1], one[:1], one[:1], self.start[i : i + 1]) for i in range(B)]
        self.sequences = [row.struct() for row in rows]
        self.held: list[Any] = [one]  # what the calls point to must live as long
        self.tensors: dict[tuple[str, int], Tensor] = {}
        self.routings: dict[int, int] = {}
        """Claimed sparse layers, and where in `routed` each one's routing is."""
        self.routed: tuple[Tensor, ...] = ()
        """Ids, weights, scores, logits of all of them, [sparse layers, B, ·], so that a step's are copied as one."""
        self.cos, self.sin = (torch.empty(B, config.rope_dim // 2) for _ in range(2))
        self._rows: dict[tuple[str, int], CRows] = {}
        self._steps: list[CStep] = []

    def buffer(self, name: str, width: int) -> CRows:
        """The structure for a buffer."""
        if (name, width) not in self._rows:
            self.tensors[name, width] = torch.empty(self.B, width)
            self._rows[name, width] = views.rows(self.tensors[name, width])
        return self._rows[name, width]

    def tensor(self, name: str, width: int) -> Tensor:
        """The buffer itself."""
        self.buffer(name, width)
        return self.tensors[name, width]

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

    def call(self, kind: int, *arguments: Structure | Array[Any] | int | None, n: tuple[int, int] = (0, 0),
             factor: float = 1.0) -> None:  # fmt: skip
        """One native call."""
        self.held.extend(arguments)
        places = [a if a is None or isinstance(a, int) else addressof(a) for a in arguments]
        self._steps.append(CStep(kind, (c_void_p * 8)(*places), n, factor))

    def routing(self, layer: int, E: int, K: int) -> list[Tensor]:
        """Where a claimed layer's ids [B, K], weights [B, K], scores and logits [B, E] go."""
        sparse = self.config.sparse_layers
        if not self.routed:
            floats = [torch.empty(len(sparse), self.B, n) for n in (K, E, E)]
            self.routed = (torch.empty(len(sparse), self.B, K, dtype=torch.int64), *floats)
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
        return self._steps, self.copies, self.sources, self.attentions, self.held

    def mark(self) -> tuple[int, ...]:
        """Where the builder is, for `reset`."""
        return tuple(len(written) for written in self._written)

    def reset(self, mark: tuple[int, ...]) -> None:
        """Forget what was written since."""
        for written, n in zip(self._written, mark, strict=True):
            del written[n:]
