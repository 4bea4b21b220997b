"""Edited decoding: requests with a mask, a swap, a force and a replay beside one without, against an oracle that knows
no edits.

What an edit asks for is put into what the oracle is given: an expert that is off has a logit of −∞, two that are
swapped have each other's weights, and whoever is forced or replayed has a selection bias that nobody else reaches.

T positions of a sequence, E experts, K experts per token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from manyhands.check.decoding import NEW_TOKENS, DecodingCheck, Recorder, build
from manyhands.check.model import DTYPES, Routings
from manyhands.check.oracle_attention import Params
from manyhands.check.report import Row
from manyhands.config import ModelConfig, RouterConfig, SamplingConfig
from manyhands.moe import Force, Mask, Replay, Routing, Swap
from manyhands.moe.edit import Edit

FAR = 8.0
"""A selection bias beyond every score, and how far the next one lies from it."""
PROMPT = 5
RECORDED = PROMPT + 2
"""Tokens that the replay is of; behind them the router decides, but not one with groups: who is told so here is held
back by none."""


def editable(config: ModelConfig) -> bool:
    """Whether its routers take every edit that is made here: off is one expert, and a group keeps two."""
    if config.moe is None:
        return False
    router = config.moe.router
    left = router.num_experts - 1
    kind = router.select == "topk" and router.causal_safe and router.bias_on == "score"
    return kind and left > router.num_experts_per_tok and router.num_experts // router.n_group >= 3


class EditedCheck(DecodingCheck):
    """One model, whose requests are edited side by side, each in its own way, in every sparse layer."""

    def rows(self, batches: Sequence[int] = ()) -> Iterator[tuple[list[Row], Routings]]:
        """One row of each quantity; `batches` says nothing here."""
        self.model = self.given or build(self.config, self.packed, DTYPES[self.dtype], self.seed)
        self.recorder = Recorder(self.model)
        generator = torch.Generator().manual_seed(self.seed)
        assert self.config.moe is not None
        self.edits = [None, *_edits(self.config.moe.router, generator)]
        engine = self._engine(len(self.edits))
        for b, edit in enumerate(self.edits):
            layers = {} if edit is None else dict.fromkeys(self.config.sparse_layers, edit)
            sampling = SamplingConfig(max_new_tokens=NEW_TOKENS, seed=self.seed + b)
            engine.add(self._tokens(PROMPT, generator), sampling, edit=layers)
        while engine.busy:
            engine.step()
        yield self._compare(f"generate, {len(self.edits)} rows, edited")

    def _described(self, p: Params, sequence: int, length: int) -> tuple[ModelConfig, Params]:
        edit, config = self.edits[sequence], self.config
        assert config.moe is not None
        changed = dict(p)
        for layer in config.sparse_layers:
            prefix = f"layers.{layer}.mlp."
            if isinstance(edit, Swap):
                changed |= _swapped(edit, (prefix + "experts.", prefix + "average_outputs"), p)
            elif edit is not None:
                changed |= _told(edit, prefix + "router.", p, config.moe.router, length)
        if isinstance(edit, Force | Replay):  # whom no group holds back
            router = config.moe.router.model_copy(update={"n_group": 1, "topk_group": 1})
            config = config.model_copy(update={"moe": config.moe.model_copy(update={"router": router})})
        return config, changed

    def _texts(self) -> list[tuple[list[int], dict[int, Routing]]]:
        """Who was swapped has the name under which the router chose it: the oracle's weights are swapped."""
        texts = super()._texts()
        for b, edit in enumerate(self.edits):
            if isinstance(edit, Swap):
                ids, routings = texts[b]
                texts[b] = ids, {layer: _named(edit, routing) for layer, routing in routings.items()}
        return texts


def _edits(router: RouterConfig, generator: torch.Generator) -> list[Edit]:
    E, K = router.num_experts, router.num_experts_per_tok
    recorded = RECORDED if router.n_group == 1 else PROMPT + NEW_TOKENS
    drawn_TK = torch.rand(recorded, E, generator=generator).argsort(1)[:, :K]
    return [Mask((1,)), Swap(0, E - 1), Force(tuple(range(E - 1, E - 1 - K, -1))), Replay(drawn_TK)]


def _swapped(edit: Swap, prefixes: tuple[str, ...], p: Params) -> dict[str, Tensor]:
    """What both experts are, in each other's places."""
    found = {name: t.clone() for name, t in p.items() if name.startswith(prefixes)}
    for name, t in found.items():
        t[edit.expert], t[edit.by] = p[name][edit.by], p[name][edit.expert]
    return found


def _told(edit: Edit, prefix: str, p: Params, router: RouterConfig, length: int) -> dict[str, Tensor]:
    """The router's biases: on the logits [E], for the selection [E] or, of a replay, [T, E]."""
    E, none = router.num_experts, torch.zeros(router.num_experts, dtype=torch.float64)
    logits, choice = prefix + "bias", prefix + "e_score_correction_bias"
    bias = p.get(choice, none).clone()
    if isinstance(edit, Mask):
        off = torch.isin(torch.arange(E), torch.tensor(edit.experts))
        bias[off] = -FAR  # a sigmoid's score of 0 would be chosen before a score with a negative bias
        return {logits: p.get(logits, none).masked_fill(off, -torch.inf), choice: bias}
    wanted_TK = edit.expert_ids if isinstance(edit, Replay) else torch.tensor([edit.experts]).expand(length, -1)  # type: ignore[union-attr]
    bias_TE = bias.repeat(length, 1)
    in_turn = FAR * torch.arange(wanted_TK.shape[1], 0, -1, dtype=torch.float64)  # best first, as it was given
    wanted_TK = wanted_TK[:length]
    bias_TE[: len(wanted_TK)] = none.repeat(len(wanted_TK), 1).scatter(1, wanted_TK, in_turn.expand(wanted_TK.shape))
    return {choice: bias_TE}


def _named(edit: Swap, routing: Routing) -> Routing:
    ids = routing.expert_ids.clone()
    ids[routing.expert_ids == edit.expert], ids[routing.expert_ids == edit.by] = edit.by, edit.expert
    return replace(routing, expert_ids=ids)
