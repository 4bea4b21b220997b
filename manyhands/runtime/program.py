"""A model as a program: native calls, each of many parts, and between them the modules that no claim covers.

In small models the time between the calls is more than the time in them, so that a stretch of parts is one call.
Between the parts everything is float32, whatever the model's dtype. Prompts, chunks of prompts and single tokens go
the same way: a step runs the next tokens of some sequences, and a row's numbers depend on its sequence alone.

T tokens of R sequences, D model width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import is_

import torch
from torch import Tensor

from manyhands.layers.cache import Cache, PagedCache
from manyhands.models import Decoder
from manyhands.moe import Routing
from manyhands.moe.edit import NO_EDITS, Edits
from manyhands.runtime.builder import Builder
from manyhands.runtime.head import Head
from manyhands.runtime.reroute import follows
from manyhands.runtime.segments import Moment, Native
from manyhands.runtime.sequences import Rotations, Sequences
from manyhands.runtime.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the model, and why it is called as a module (None: it is native)."""

    name: str
    layer: int | None
    why: str | None


@dataclass(frozen=True, slots=True)
class Step:
    """What a step made. Inference tensors, to be read only."""

    logits: Tensor
    """[drawing rows, V]; float32 where the head is native."""
    routings: Callable[[], dict[int, Routing]]
    """Of each sparse layer, T tokens."""
    experts: Callable[[], tuple[Tensor, Tensor]] | None
    """Of all of them together ids and weights, [sparse layers, T, K]; None where modules routed some."""
    states: Tensor | None
    """[T, D] in the model's dtype after the final norm, where they were asked for."""


class Program:
    """Prepared once (`prepare`) for steps of at most `capacity` tokens, good for as long as `current`.

    The calls read the weights where they lie, so that a change in place is seen; what is a copy is made again in each
    step. A module that is called is called as ever: hooks, wrappers and overridden methods are heard.
    """

    def __init__(self, model: Decoder, builder: Builder, snapshot: Snapshot, parts: list[Part], head: Head) -> None:
        self.parts, self.capacity, self.editable = parts, builder.capacity, builder.editable
        self.most = builder.capacity if builder.fetches else builder.most
        self._model, self._config = model, model.config
        self._roots = [model.layers, model.norm, model.embed_tokens, model.lm_head]
        self._snapshot, self._b, self._segments, self._head = snapshot, builder, builder.segments, head
        self._sequences, self._rotations = Sequences(builder.sequences), Rotations(model.config)
        self._seen: list[list[Tensor]] = []
        self._room = self._count = 0
        self._real_T = torch.empty(0, dtype=torch.bool)

    @property
    def native(self) -> bool:
        """Whether any part is: else the modules do as well alone."""
        return any(isinstance(segment, Native) for segment in self._segments) and any(p.why is None for p in self.parts)

    @property
    def whole(self) -> bool:
        """Whether every part is."""
        return all(part.why is None for part in self.parts)

    @property
    def reads_blocks(self) -> bool:
        """Whether it wants caches in blocks: some attention is native."""
        return bool(self._b.attentions)

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

    def current(self) -> bool:
        """Whether the model is still what this was made from: nothing replaced, nobody began or ceased to listen."""
        m = self._model
        now = (m.layers, m.norm, m.embed_tokens, m.lm_head)
        return m.config is self._config and all(map(is_, self._roots, now)) and self._snapshot.holds()

    def follows(self, edits: Edits) -> bool:
        """Whether its native routers do what these say; modules that it calls do it all."""
        routers = {layer: biases.router.config for layer, biases in self._b.biases.items()}
        return all(follows(edit, routers[layer]) for layer, edit in edits.items() if layer in routers)

    def takes(self, caches: Sequence[Cache]) -> bool:
        """Whether the claimed attention reads caches like these: blocks of the same pools, in the compute dtype."""
        if not self._b.attentions:
            return True
        first = caches[0]
        if not isinstance(first, PagedCache) or len(first.pools) != len(self._model.layers):
            return False
        held = first.pools[self._b.attentions[0].layer].buffers
        return (not held or held[0].dtype == self._model.embed_tokens.weight.dtype) and all(
            isinstance(cache, PagedCache) and cache.pools is first.pools for cache in caches
        )

    def run(
        self, ids: Sequence[int], counts: Sequence[int], caches: Sequence[Cache], draws: Sequence[int],
        states: bool = False, edits: Edits = NO_EDITS,
    ) -> Step:  # fmt: skip
        """The next tokens of some sequences, `counts` of each, one sequence behind the other; each has a cache.

        `draws` are the rows whose logits are wanted, in ascending order; `states` asks for all rows' states too.
        `edits` are for an editable program that `follows` them.
        """
        assert not edits or self.editable
        b, T, firsts = self._b, len(ids), [cache.length for cache in caches]
        if self._count != T:
            b.count(T)
            self._count, self._real_T = T, torch.ones(T, dtype=torch.bool)
        ids_1T = torch.tensor([ids])
        x = self._model.embed(ids_1T)
        room = _make_room(ids_1T, counts, caches)
        moment = Moment(self._config, x.dtype, ids_1T, counts, caches, room, edits=edits)
        b.tensors["x", b.D][:T].copy_(x[0])
        if b.attentions:
            self._bind(counts, firsts, caches)
        if b.copies:
            torch._foreach_copy_(b.copies, b.sources)
        for layer, biases in b.biases.items():
            biases.fill(edits.get(layer))
        for segment in self._segments:
            segment.run(moment)
        for cache in caches:
            if isinstance(cache, PagedCache):
                cache.written = cache.length
        states_TD = b.tensors["states", b.D][:T]
        if self._config.output_multiplier != 1.0:
            states_TD.mul_(self._config.output_multiplier)
        logits = self._head.logits(states_TD, draws, x.dtype)
        copies = [t[:, :T].clone() for t in b.routed]
        experts = (lambda: (copies[0], copies[1])) if copies and not moment.routings else None
        return Step(
            logits, self._routings(moment, copies), experts, states_TD.to(x.dtype, copy=True) if states else None
        )

    def _routings(self, moment: Moment, copies: list[Tensor]) -> Callable[[], dict[int, Routing]]:
        """Of all sparse layers: what native calls and what modules routed, put together when somebody looks."""
        b, called, real_T = self._b, moment.routings, self._real_T

        def together() -> dict[int, Routing]:
            found = dict(called)
            for layer, i in b.routings.items():
                ids, weights, scores, logits = (t[i] for t in copies)
                kept_TK = moment.kept.get(layer, torch.ones(ids.shape, dtype=torch.bool))
                found[layer] = Routing(ids, weights, scores, logits, kept_TK, real_T)
            return dict(sorted(found.items()))

        return together

    def _bind(self, counts: Sequence[int], firsts: Sequence[int], caches: Sequence[Cache]) -> None:
        """Where this step's keys go, and where the earlier ones are."""
        b = self._b
        paged = [cache for cache in caches if isinstance(cache, PagedCache)]
        self._sequences.bind(counts, firsts, paged)
        self._rotations.fill(b.cos, b.sin, counts, firsts)
        pools = [paged[0].pools[claimed.layer] for claimed in b.attentions]
        now = [pool.buffers for pool in pools]
        if self._sequences.blocks <= self._room and all(map(is_, now, self._seen)):
            return
        weight = self._model.embed_tokens.weight
        for claimed, pool in zip(b.attentions, pools, strict=True):
            claimed.bind(pool.hold(self._sequences.blocks, claimed.kinds, weight))
        self._seen = [pool.buffers for pool in pools]
        self._room = min(buffers[0].shape[0] for buffers in self._seen)


def _make_room(ids_1T: Tensor, counts: Sequence[int], caches: Sequence[Cache]) -> list[Tensor | None]:
    """Every cache has positions for its sequence's tokens; which of its positions are no padding, None: all."""
    real: list[Tensor | None] = [None] * len(caches)
    start = 0
    for i, (cache, count) in enumerate(zip(caches, counts, strict=True)):
        if isinstance(cache, PagedCache):
            cache.take(count)
        else:
            real[i] = cache.extend(ids_1T[:, start : start + count], None)
        start += count
    return real


def _span(numbers: list[int]) -> str:
    """Layer numbers, in short."""
    if len(numbers) > 1 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}–{numbers[-1]}"
    return ", ".join(map(str, numbers))
