"""A batch through a model: the logits of the rows that draw, and everybody's routing.

T tokens of R rows, D model width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from manyhands.engine.batch import Batch
from manyhands.engine.mode import evaluating
from manyhands.kernels.native import step
from manyhands.kernels.policy import MOST_APART
from manyhands.layers.cache import ContiguousLayer
from manyhands.models import Decoder, Hidden
from manyhands.models.decoder import Block
from manyhands.models.fused import FusedStep, fused_step
from manyhands.moe import Routing


@dataclass(frozen=True, slots=True)
class Routed:
    """Who went where in one pass, by sparse layer."""

    layers: dict[int, Routing]
    num_tokens: int
    """T."""

    def rows(self, tokens: slice) -> dict[int, Routing]:
        """The routing of some of the tokens."""
        if self.num_tokens == 1:  # decoding alone: not worth a hundred views
            return self.layers
        return {layer: routing.rows(tokens) for layer, routing in self.layers.items()}


@dataclass(frozen=True, slots=True)
class Forward:
    """What a pass made. Inference tensors: to be read only."""

    logits: Tensor
    """[drawing rows, V]"""
    routed: Routed


class Runner:
    """Runs one model, in evaluation and in the dtype of its weights. Its training mode is as it was after each call."""

    def __init__(self, model: Decoder) -> None:
        self.model = model
        self.device = model.embed_tokens.weight.device
        self._modules = list(model.modules())
        self._fused: dict[int, FusedStep | None] = {}  # by number of sequences; None: there can be none

    def run(self, batch: Batch) -> Forward:
        """One forward pass; each row's cache is extended by its tokens, none of them twice."""
        with torch.inference_mode(), evaluating(self._modules):
            hidden = self.hidden(batch)
            states_TD = hidden.states[0]
            if len(batch.drawing) < batch.num_tokens:
                states_TD = states_TD[[batch.last[row] for row in batch.drawing]]
            return Forward(self.model.head(states_TD), Routed(hidden.routings, batch.num_tokens))

    def hidden(self, batch: Batch) -> Hidden:
        """The pass up to the head: states [1, T, D]."""
        ids_1T = batch.ids(self.device)
        if len(batch.rows) == 1:
            return self.model.hidden(ids_1T, cache=batch.rows[0].cache)
        counts, caches = [len(row.ids) for row in batch.rows], [row.cache for row in batch.rows]
        if batch.num_tokens > len(counts) or not self._direct(batch):
            return self.model.hidden_rows(ids_1T, counts, caches)
        parts = [slice(first, first + MOST_APART) for first in range(0, len(counts), MOST_APART)]
        done = [
            self.model.hidden_rows(ids_1T[:, rows], counts[rows], caches[rows], self._program(len(counts[rows])))
            for rows in parts
        ]
        if len(done) == 1:
            return done[0]
        routings = joined([hidden.routings for hidden in done])
        return Hidden(torch.cat([hidden.states for hidden in done], 1), routings, {}, None)

    def _direct(self, batch: Batch) -> bool:
        """Whether native calls can take the rows' next tokens, one of each."""
        weight = self.model.embed_tokens.weight.detach()
        firsts = [row.cache.layers[0] for row in batch.rows]
        ready = all(isinstance(layer, ContiguousLayer) and layer.dtype == weight.dtype for layer in firsts)
        return ready and step.direct(weight) and self._program(min(len(firsts), MOST_APART)) is not None

    def _program(self, B: int) -> FusedStep | None:
        """The native calls for B rows with a token and a cache each, where there can be any."""
        found = self._fused.get(B)
        if B not in self._fused or (found is not None and not found.current(self.model)):
            ours = all(type(block) is Block for block in self.model.layers)
            found = self._fused[B] = fused_step(self.model, B, apart=True) if ours else None
        return found

    @torch.no_grad()
    def score(self, ids_BS: Tensor, mask_BS: Tensor | None, dtype: torch.dtype | None = None) -> Hidden:
        """A rectangle of texts, without a cache: for whoever wants every token's state and not a next token."""
        with evaluating(self._modules):
            return self.model.hidden(ids_BS, mask_BS, dtype=dtype)


def joined(passes: Sequence[dict[int, Routing]]) -> dict[int, Routing]:
    """The routing of successive passes, per sparse layer, as one."""
    return {layer: Routing.cat([routings[layer] for routings in passes]) for layer in (passes[0] if passes else ())}
