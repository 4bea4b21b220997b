"""A batch through a model: the logits of the rows that draw, and everybody's routing.

T tokens of R rows, D model width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from manyhands.engine.batch import Batch
from manyhands.engine.mode import evaluating
from manyhands.kernels.native import step
from manyhands.kernels.policy import MOST_APART
from manyhands.layers.cache import Cache
from manyhands.models import Decoder, Hidden
from manyhands.moe import Routing
from manyhands.runtime import Program, prepare


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
        self._training: list[nn.Module] = []
        self._programs: dict[int, Program] = {}  # by number of sequences

    def run(self, batch: Batch) -> Forward:
        """One forward pass; each row's cache is extended by its tokens, none of them twice."""
        with torch.inference_mode(), evaluating(self._modules) as self._training:
            hidden = self.hidden(batch)
            states_TD = hidden.states[0]
            if len(batch.drawing) < batch.num_tokens:
                states_TD = states_TD[[batch.last[row] for row in batch.drawing]]
            return Forward(self.model.head(states_TD), Routed(hidden.routings, batch.num_tokens))

    def hidden(self, batch: Batch) -> Hidden:
        """The pass up to the head: states [1, T, D]."""
        ids_1T = batch.ids(self.device)
        decodes = batch.num_tokens == len(batch.rows) and step.direct(self.model.embed_tokens.weight.detach())
        if not decodes:
            self._look_again()
        if len(batch.rows) == 1:
            cache = batch.rows[0].cache
            return self.model.hidden(ids_1T, cache=cache, program=self._program([cache]) if decodes else None)
        counts, caches = [len(row.ids) for row in batch.rows], [row.cache for row in batch.rows]
        if not decodes:
            return self.model.hidden_rows(ids_1T, counts, caches)
        parts = [slice(first, first + MOST_APART) for first in range(0, len(counts), MOST_APART)]
        done = [
            self.model.hidden_rows(ids_1T[:, rows], counts[rows], caches[rows], self._program(caches[rows]))
            for rows in parts
        ]
        if len(done) == 1:
            return done[0]
        routings = joined([hidden.routings for hidden in done])
        return Hidden(torch.cat([hidden.states for hidden in done], 1), routings, {}, None)

    def _look_again(self) -> None:
        """A module that was put in since is in evaluation mode too, for this pass."""
        self._modules = list(self.model.modules())
        for module in self._modules:
            if module.training:
                module.training = False
                self._training.append(module)

    def _program(self, caches: Sequence[Cache]) -> Program | None:
        """What runs the blocks for rows with a token and a cache each; None: the modules do as well."""
        B = len(caches)
        found = self._programs.get(B)
        if found is None or not found.current(self.model):
            self._look_again()
            found = self._programs[B] = prepare(self.model, B)
        return found if found.native and found.takes(caches, self.model.embed_tokens.weight.dtype) else None

    @torch.no_grad()
    def score(self, ids_BS: Tensor, mask_BS: Tensor | None, dtype: torch.dtype | None = None) -> Hidden:
        """A rectangle of texts, without a cache: for whoever wants every token's state and not a next token."""
        with evaluating(self._modules):
            return self.model.hidden(ids_BS, mask_BS, dtype=dtype)


def joined(passes: Sequence[dict[int, Routing]]) -> dict[int, Routing]:
    """The routing of successive passes, per sparse layer, as one."""
    return {layer: Routing.cat([routings[layer] for routings in passes]) for layer in (passes[0] if passes else ())}
