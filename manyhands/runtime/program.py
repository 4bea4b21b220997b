"""Decoding as a program: native calls, each of many parts, and between them the modules that no claim covers.

In small models the time between the calls is more than the time in them, so that a stretch of parts is one call.
Between the parts everything is float32, whatever the model's dtype.

B sequences of one token each, D model width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from manyhands.kernels.native import step
from manyhands.layers.attention import Positions, start_of
from manyhands.layers.cache import Cache, ContiguousLayer
from manyhands.models import Decoder
from manyhands.moe import Routing
from manyhands.runtime.builder import Builder
from manyhands.runtime.segments import Moment, Native
from manyhands.runtime.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the model, and why it is called as a module (None: it is native)."""

    name: str
    layer: int | None
    why: str | None


class Program:
    """Prepared once (`prepare`), good for as long as `current`.

    The calls read the weights where they lie, so that a change in place is seen; what is a copy is made again in each
    step. A module that is called is called as ever: hooks, wrappers and overridden methods are heard.
    """

    def __init__(self, model: Decoder, builder: Builder, snapshot: Snapshot, parts: list[Part]) -> None:
        self.parts = parts
        self._config, self._layers, self._last = model.config, model.layers, model.norm
        self._snapshot, self._b, self._segments = snapshot, builder, builder.segments
        self._seen: list[Any] = [None] * len(builder.attentions)

    @property
    def native(self) -> bool:
        """Whether any part is: else the modules do as well alone."""
        return any(isinstance(segment, Native) for segment in self._segments) and any(p.why is None for p in self.parts)

    def __repr__(self) -> str:
        """Which parts are native; which are called as modules, and why."""
        called: dict[tuple[str, str], list[int | None]] = {}
        for part in self.parts:
            if part.why is not None:
                called.setdefault((part.name, part.why), []).append(part.layer)
        said = [f"{len(self.parts) - sum(map(len, called.values()))} of {len(self.parts)} parts native"]
        for (name, why), layers in called.items():
            numbers = [layer for layer in layers if layer is not None]
            where = f"{name} of layer{'s' if len(numbers) > 1 else ''} {_span(numbers)}" if numbers else name
            said.append(f"{where} called as modules ({why})")
        return "; ".join(said)

    def current(self, model: Decoder) -> bool:
        """Whether the model is still what this was made from: nothing replaced, nobody began or ceased to listen."""
        return (
            model.config is self._config
            and model.layers is self._layers
            and model.norm is self._last
            and self._snapshot.holds()
        )

    def takes(self, caches: Sequence[Cache], dtype: torch.dtype) -> bool:
        """Whether the claimed attention reads caches like these: in one piece, begun, of the compute dtype.

        Their padding, if there is any, is at the head.
        """
        if not self._b.attentions:
            return True
        first = self._b.attentions[0][0]
        layers = [cache.layers[first] for cache in caches]
        if not all(isinstance(layer, ContiguousLayer) and layer.dtype == dtype for layer in layers):
            return False
        masks = [cache.mask_BS for cache in caches if cache.mask_BS is not None]
        return all(start_of(F.pad(mask, (0, 1), value=True), False) is not None for mask in masks)

    def step(
        self, x: Tensor, positions: Positions, caches: Sequence[Cache], real_1B: Tensor, ids_1B: Tensor
    ) -> tuple[Tensor, dict[int, Routing]]:
        """[1, B, D] after the embedding -> the same after the final norm, and the routing of each sparse layer.

        Every row has a cache of its own, which has made room in its mask but not in its layers.
        """
        b = self._b
        b.tensors["x", b.D].copy_(x.view(b.B, b.D))
        if b.attentions:
            self._bind(positions, caches)
        if b.copies:
            torch._foreach_copy_(b.copies, b.sources)
        moment = Moment(x.dtype, positions, caches, real_1B, ids_1B)
        for segment in self._segments:
            segment.run(moment)
        states = b.tensors["states", b.D].to(x.dtype, copy=True).view(x.shape)
        routings = moment.routings
        if b.routings:
            real_B, parts = real_1B[0], [t.clone().unbind(0) for t in b.routed]
            kept_BK = torch.ones_like(parts[0][0], dtype=torch.bool)
            for layer, i in b.routings.items():
                ids, weights, scores, logits = (part[i] for part in parts)
                routings[layer] = Routing(ids, weights, scores, logits, kept_BK, real_B)
        return states, dict(sorted(routings.items())) if len(b.routings) < len(routings) else routings

    def _bind(self, positions: Positions, caches: Sequence[Cache]) -> None:
        """Where this step's keys go, how many there are, who may look where."""
        b = self._b
        for table, now in zip((b.cos, b.sin), positions.rope, strict=True):
            table.copy_(now.flatten(0, 2))
        rows = [row for _, row in positions.rows] or [positions]
        b.start.copy_(torch.cat([row.start_B for row in rows if row.start_B is not None]))
        for i, (layer, row, struct) in enumerate(b.attentions):
            cache = caches[row].layers[layer]
            assert isinstance(cache, ContiguousLayer)
            buffers = tuple(cache.grow(1))
            if self._seen[i] is None or not all(map(is_, buffers, self._seen[i])):
                step.bind_cache(struct, *buffers)
                self._seen[i] = buffers
        first = b.attentions[0][0]
        b.first.copy_(torch.tensor([cache.layers[first].length - 1 for cache in caches]))


def _span(numbers: list[int]) -> str:
    """Layer numbers, in short."""
    if len(numbers) > 1 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}–{numbers[-1]}"
    return ", ".join(map(str, numbers))
