"""A batch through a model: the logits of the rows that draw, and everybody's routing.

T tokens of R rows, D model width, V vocabulary.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from manyhands.config.decoder import as_decoder
from manyhands.config.packing import TRAITS
from manyhands.engine.batch import Batch, Row
from manyhands.engine.caches import Caches
from manyhands.engine.mode import evaluating
from manyhands.kernels.moment import exactly
from manyhands.kernels.native import step
from manyhands.kernels.policy import MOST_AT_ONCE
from manyhands.layers.packed_linear import RecordLinear
from manyhands.models import Decoder, Hidden
from manyhands.moe import ExpertBank, Routing
from manyhands.moe.edit import NO_EDITS, Edits, replays
from manyhands.moe.packed import RecordExperts
from manyhands.moe.stored import StoredExperts
from manyhands.quant import Layout
from manyhands.runtime import Program, prepare
from manyhands.runtime.program import Step
from manyhands.store.store import Store

_log = logging.getLogger(__name__)

Experts = Callable[[], tuple[Tensor, Tensor]]


class Routed:
    """Who went where in one pass, by sparse layer."""

    __slots__ = ("_experts", "_layers", "_made", "num_tokens", "sizes")

    def __init__(
        self,
        made: Callable[[], dict[int, Routing]],
        num_tokens: int,
        experts: Experts | None = None,
        sizes: Sequence[int] | None = None,
    ) -> None:
        """`made` puts it together, when somebody looks; `experts` gives only those, if that is less work."""
        self._made, self.num_tokens, self._experts = made, num_tokens, experts
        self.sizes = [num_tokens] if sizes is None else list(sizes)
        """Tokens of each part, where the pass was run in several, one after the other."""
        self._layers: dict[int, Routing] | None = None

    @property
    def layers(self) -> dict[int, Routing]:
        """Of all T tokens. Inference tensors."""
        if self._layers is None:
            with torch.inference_mode():
                self._layers = self._made()
        return self._layers

    def experts(self) -> tuple[Tensor, Tensor]:
        """Of all sparse layers together ids and weights, [sparse layers, T, K]. Not for a model that has none."""
        if self._experts is not None:
            return self._experts()
        layers = self.layers.values()
        return torch.stack([r.expert_ids for r in layers]), torch.stack([r.weights for r in layers])

    def rows(self, tokens: slice) -> dict[int, Routing]:
        """The routing of some of the tokens."""
        if self.num_tokens == 1:  # decoding alone: not worth a hundred views
            return self.layers
        return {layer: routing.rows(tokens) for layer, routing in self.layers.items()}


@dataclass(frozen=True, slots=True)
class Forward:
    """What a pass made. Inference tensors: to be read only."""

    logits: Tensor
    """[R, V], of the tokens `Batch.draws`."""
    routed: Routed
    states: Tensor | None
    """[T, D] after the final norm, where they were asked for."""


class Runner:
    """Runs one model, in evaluation and in the dtype of its weights. Its training mode is as it was after each call."""

    def __init__(self, model: Decoder, exact: bool = False) -> None:
        """`exact`: every row has the same bits however many run beside it, as rows of a model with int8 or int4 weights
        always do."""
        as_decoder(model.config, "the engine")
        self.model, self._asked = model, exact
        self.device = model.embed_tokens.weight.device
        self._modules = list(model.modules())
        self._exact = exact or has_integers(self._modules)
        self.store = store_of(self._modules)
        """Who brings experts that lie on disk; None: all are in memory."""
        self._training: list[nn.Module] = []
        self._program: Program | None = None
        self._edited: Program | None = None

    def run(self, batch: Batch, states: bool = False) -> Forward:
        """One forward pass; each row's cache is extended by its tokens, none of them twice.

        `states` asks for those of all tokens.
        """
        if not any(row.edits for row in batch.rows):
            return self._alike(batch, states, NO_EDITS)
        passes = [self._alike(part, states, part.edits) for part in batch.alike()]
        return passes[0] if len(passes) == 1 else _together(passes, batch.num_tokens)

    def _alike(self, batch: Batch, states: bool, edits: Edits) -> Forward:
        """Of rows whose routing is edited in the same way, or not."""
        with torch.inference_mode(), evaluating(self._modules) as self._training:
            program = self._prepared(batch.num_tokens, bool(edits))
            with exactly(self._exact):
                if program is None or self._too_many(program, batch) or not program.takes(batch.caches):
                    return self._modules_run(batch, states, edits)
                if not program.follows(edits):
                    return self._modules_run(batch, states, edits)
                return self._run(program, batch, states, bool(edits))

    def logits(self, states_TD: Tensor) -> Tensor:
        """[T, V], what the head makes of states: the bits that `run` makes of them. An inference tensor."""
        with torch.inference_mode(), evaluating(self._modules) as self._training, exactly(self._exact):
            made: Tensor = self.model.head(states_TD)
            return made

    @property
    def reads_blocks(self) -> bool:
        """Whether caches in blocks are the ones to give it: native attention reads those and no others."""
        with torch.inference_mode(), evaluating(self._modules) as self._training:
            program = self._prepared(1)
        return program is not None and program.reads_blocks

    def _most(self, program: Program) -> int:
        """Tokens of a step: PyTorch multiplies many rows by plain weights faster, but not with the bits of a few."""
        most = program.capacity if self._exact else program.most
        return min(most, self._most_stored)

    @property
    def _most_stored(self) -> int:
        """Tokens of a pass whose experts have room, whichever they choose."""
        store, moe = self.store, self.model.config.moe
        if store is None or moe is None:
            return MOST_AT_ONCE
        return min(MOST_AT_ONCE, store.most_rows(store.layers[0].layer, moe.router.num_experts_per_tok))

    def _too_many(self, program: Program, batch: Batch) -> bool:
        """Whether PyTorch reads these prompts faster. What merely exceeds the capacity runs in parts."""
        cut = self._most(program) < program.capacity
        return cut and self.store is None and batch.num_tokens > program.most and batch.num_tokens > len(batch.rows)

    def _run(self, program: Program, batch: Batch, states: bool, edited: bool = False) -> Forward:
        """In steps of no more than are worth the memory; their size shows in no number."""
        parts = list(batch.parts(self._most(program)))
        steps = [self._pass(program, part, states, edited) for part in parts]
        if len(steps) == 1:
            (one,) = steps
            return Forward(one.logits, Routed(one.routings, batch.num_tokens, one.experts), one.states)
        found = [s.states for s in steps if s.states is not None]
        logits = torch.cat([s.logits for s in steps])
        each = [s.experts for s in steps if s.experts is not None]
        experts = partial(_experts, each) if len(each) == len(steps) else None
        sizes = [part.num_tokens for part in parts]
        routed = Routed(lambda: joined([s.routings() for s in steps]), batch.num_tokens, experts, sizes)
        return Forward(logits, routed, torch.cat(found) if found else None)

    def _pass(self, program: Program, part: Batch, states: bool, edited: bool) -> Step:
        edits = part.edits if edited else NO_EDITS
        with self._step():
            return program.run(part.ids, part.counts, part.caches, part.draws, states, edits)

    def _step(self) -> AbstractContextManager[None]:
        """Of the store, if there is one."""
        return nullcontext() if self.store is None else self.store.step()

    def _modules_run(self, batch: Batch, states: bool, edits: Edits) -> Forward:
        """Where there is no program for it."""
        self._look_again()
        ids_1T = torch.tensor([batch.ids], device=self.device)
        with self._step():
            if len(batch.rows) == 1:
                hidden = self.model.hidden(ids_1T, cache=batch.caches[0], edit=edits)
            else:
                hidden = self.model.hidden_rows(ids_1T, batch.counts, batch.caches, edits)
        drawn = hidden.states[0]
        if len(batch.draws) < batch.num_tokens:
            drawn = drawn[batch.draws]
        routed = Routed(lambda: hidden.routings, batch.num_tokens)
        return Forward(self.model.head(drawn), routed, hidden.states[0] if states else None)

    def _look_again(self) -> None:
        """A module that was put in since is in evaluation mode too, for this pass."""
        self._modules = list(self.model.modules())
        self._exact = self._asked or has_integers(self._modules)
        self.store = store_of(self._modules)
        for module in self._modules:
            if module.training:
                module.training = False
                self._training.append(module)

    def _prepared(self, tokens: int, edited: bool = False) -> Program | None:
        """The program, made again for more tokens or for another model; None: the modules do as well.

        There is another one for routing that is `edited`.
        """
        if not step.direct(self.model.embed_tokens.weight.detach()):
            return None
        found, wanted = self._edited if edited else self._program, min(tokens, self._most_stored)
        if found is None or found.capacity < wanted or not found.current():
            self._look_again()
            most = max(1 << (wanted - 1).bit_length(), 0 if found is None else found.capacity)
            found = prepare(self.model, most, edited)
            _log.debug("decoding, up to %d tokens at a time: %r", most, found)
            if edited:
                self._edited = found
            else:
                self._program = found
        return found if found.native else None

    @torch.no_grad()
    def score(
        self, ids_BS: Tensor, mask_BS: Tensor | None, dtype: torch.dtype | None = None, edit: Edits = NO_EDITS
    ) -> Hidden:
        """A rectangle of texts: for whoever wants every token's state and not a next token.

        States are [B, S, D], those of padding 0 or what they are; the routing may be that of real tokens only. Where
        all of the model is native, a text's numbers depend on the text alone, wherever its padding is. `edit` is for
        all texts; a replay has a row for each of the B·S tokens.
        """
        with evaluating(self._modules) as self._training:
            if dtype in (None, self.model.embed_tokens.weight.dtype):
                with torch.inference_mode():
                    program = None if replays(edit) else self._prepared(ids_BS.numel(), bool(edit))
                    if (
                        program is not None
                        and program.follows(edit)
                        and (self._most(program) == program.capacity or self.store is not None)
                        and program.whole
                        and (mask_BS is None or bool(mask_BS.any()))
                    ):
                        with exactly(self._exact):
                            return self._score(program, ids_BS, mask_BS, edit)
            return self.model.hidden(ids_BS, mask_BS, dtype=dtype, edit=edit)

    def _score(self, program: Program, ids_BS: Tensor, mask_BS: Tensor | None, edit: Edits) -> Hidden:
        """One text behind the other; what a text has in blocks is given back when it has run."""
        real_BS = torch.ones_like(ids_BS, dtype=torch.bool) if mask_BS is None else mask_BS.bool()
        memory = Caches(len(self.model.layers))
        texts = [ids[real].tolist() for ids, real in zip(ids_BS, real_BS, strict=True)]
        rows = [Row(ids, memory.new(), draws=False, edits=edit) for ids in texts if ids]
        lengths = {row.cache: len(row.ids) for row in rows}
        states: list[Tensor] = []
        routings: list[dict[int, Routing]] = []
        for part in Batch(rows).parts(self._most(program)):
            forward = self._run(program, part, states=True, edited=bool(edit))
            assert forward.states is not None
            states.append(forward.states)
            routings.append(forward.routed.layers)
            for cache in part.caches:
                if cache.length == lengths[cache]:
                    cache.truncate(0)
        found = states[0].new_zeros(*ids_BS.shape, states[0].shape[-1])
        found[real_BS] = torch.cat(states)
        return Hidden(found, joined(routings), {}, None)


def _together(passes: Sequence[Forward], num_tokens: int) -> Forward:
    """Passes of successive rows as one."""
    states = [f.states for f in passes if f.states is not None]
    sizes = [size for f in passes for size in f.routed.sizes]
    routed = Routed(lambda: joined([f.routed.layers for f in passes]), num_tokens, sizes=sizes)
    with torch.inference_mode():
        return Forward(torch.cat([f.logits for f in passes]), routed, torch.cat(states) if states else None)


def has_integers(modules: Iterable[nn.Module]) -> bool:
    """Whether any weight is packed as int8 or int4."""
    layouts = (layout for module in modules if (layout := _layout(module)) is not None)
    return any(TRAITS[m.format].scale for layout in layouts for m in layout.matrices)


def store_of(modules: Iterable[nn.Module]) -> Store | None:
    """The store of a model's experts, which is one for all; None if they are in memory."""
    return next((module.store for module in modules if isinstance(module, StoredExperts)), None)


def _layout(module: nn.Module) -> Layout | None:
    """Of the records that a module holds, or has brought."""
    if isinstance(module, RecordLinear | RecordExperts):
        return module.layout
    fetched = module.fetched_experts() if isinstance(module, ExpertBank) else None
    return None if fetched is None else fetched.layout


def joined(passes: Sequence[dict[int, Routing]]) -> dict[int, Routing]:
    """The routing of successive passes, per sparse layer, as one."""
    return {layer: Routing.cat([routings[layer] for routings in passes]) for layer in (passes[0] if passes else ())}


def _experts(each: Sequence[Experts]) -> tuple[Tensor, Tensor]:
    """Ids and weights of successive passes as those of one."""
    ids, weights = zip(*(experts() for experts in each), strict=True)
    return torch.cat(ids, 1), torch.cat(weights, 1)
