"""What each expert is worth: the rise of the loss on a text when its tokens have to do without it.

    found = expert_worth(model, ids_BS1)
    found.layers[1].experts[5].cost            # nats per token of the text

An expert's tokens keep their other experts, which take over its weight in proportion, so that what a token's experts
weigh together stays as it was; where there is no other (one expert per token), nothing is in its place. So an expert
that no token chose costs exactly nothing. Load says nothing of this: a router may be in perfect balance over experts
that nobody would miss. Beside each layer's costs stand what they are held against:

null       without as many pairs as an even share has, taken from all experts at random: what its size alone costs
shuffled   each token with the experts of another token, its own weights: what it is worth that they are its own
random     each token with the experts of a router that has learned nothing (`trace/random_router.py`)

And what an expert does at all: how much it says (`size`), and which other expert says the most similar (`twin`).

B texts, S tokens each, T = B·S, E experts, K per token, D model width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from manyhands.compare.passes import Passes, without
from manyhands.config import RouterConfig
from manyhands.engine.mode import evaluating
from manyhands.errors import DataError
from manyhands.models import LanguageModel
from manyhands.moe import MoELayer, Routing
from manyhands.moe.edit import Replay, check_edits
from manyhands.parallel.ranks import ALONE, Ranks
from manyhands.trace.random_router import RandomRouter

_SAMPLE = 256
"""Tokens on which experts are compared with each other, at most."""
_MOST_VALUES = 1 << 22
"""Of what they say to them, in all."""
_FIT = 2048
"""Tokens that the random router's loads are fitted to, at most."""


@dataclass(frozen=True, slots=True)
class ExpertWorth:
    """One expert."""

    expert: int
    cost: float
    """The rise of the loss without it, nats per token of the text."""
    error: float
    """Standard error of `cost` over the texts (paired: the same texts with and without)."""
    share: float
    """Of the layer's (token, expert) pairs; 1/E is even."""
    tokens: int
    """Of the text that chose it."""
    size: float | None
    """Root mean square of what it says to any token, over its layer's mean: 0 says nothing. None: not looked at."""
    twin: int | None
    """The expert that says the most similar to the same tokens. None: there is no other, or not looked at."""
    distance: float | None
    """From that one: ‖a − b‖² / (‖a‖² + ‖b‖²), 0 where both say the same, about 1 for unrelated ones."""


@dataclass(frozen=True, slots=True)
class LayerWorth:
    """One sparse layer; costs in nats per token of the text."""

    experts: tuple[ExpertWorth, ...]
    null: float
    """Without a part 1/E of its pairs, taken at random."""
    shuffled: float
    """With the experts of other tokens."""
    random: float
    """With those of a random router."""


@dataclass(frozen=True, slots=True)
class Worth:
    """What `expert_worth` found."""

    loss: float
    """As the model is, nats per token."""
    tokens: int
    texts: int
    layers: Mapping[int, LayerWorth]


def measurable(routers: Mapping[int, RouterConfig]) -> bool:
    """Whether every router can be told what to leave out, and there is any."""
    return bool(routers) and all(config.select == "topk" for config in routers.values())


def num_passes(routers: Mapping[int, RouterConfig]) -> int:
    """How often `expert_worth` runs the text through the model, or through a part of it."""
    return 1 + sum(config.num_experts + 3 for config in routers.values())


@torch.no_grad()
def expert_worth(
    model: LanguageModel,
    ids_BS1: Tensor,
    *,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    ranks: Ranks = ALONE,
    plain: bool = False,
) -> Worth:
    """The rise of the loss on texts [B, S + 1] without each expert of each sparse layer, one at a time.

    Each token but a text's first is predicted; `dtype` is the compute dtype (None: that of the weights). All texts run
    at once. A layer's passes begin at that layer, from what came out of the ones below; `plain`: each goes through the
    whole model, which is the reference. Of several `ranks` each calls it alike, runs its part of the texts through the
    whole model, and gets the figures of all, without `size` and `twin`. Nothing about the model changes, and torch's
    generators are left alone: `seed` decides what is random.

    Raises `DataError` for fewer than two texts or no token to predict; `ConfigError` for routers that are not
    `measurable`.
    """
    if ids_BS1.dim() != 2 or ids_BS1.shape[0] < 2 or ids_BS1.shape[1] < 2:
        raise DataError(f"texts are {list(ids_BS1.shape)}: an error needs two texts, of two tokens at least")
    sparse = model.sparse_layers()
    configs = {layer: mlp.router.config for layer, mlp in sparse.items()}
    check_edits({layer: Replay(torch.zeros(0, c.num_experts_per_tok).long()) for layer, c in configs.items()}, configs)
    with evaluating(list(model.modules())):
        passes = Passes(model, ids_BS1, dtype, ranks, plain=plain)
        layers = {layer: _layer(passes, layer, mlp, seed, ids_BS1, ranks) for layer, mlp in sparse.items()}
        passes.done()
    tokens = ids_BS1[:, 1:].numel()
    return Worth(float(passes.base_B.sum()) / tokens, tokens, len(ids_BS1), layers)


def _layer(passes: Passes, layer: int, mlp: MoELayer, seed: int, ids_BS1: Tensor, ranks: Ranks) -> LayerWorth:
    routing, inputs_TD = passes.routings[layer], passes.inputs[layer]
    E, (B, S1) = routing.num_experts, ids_BS1.shape
    generator = torch.Generator().manual_seed(1_000_003 * (seed % (1 << 32)) + 1009 * layer + ranks.rank)
    counts_E = ranks.sum(routing.expert_counts() * passes.counted).cpu()

    def rise(edit: Replay) -> Tensor:
        """[B] float64, nats per token."""
        return (passes.nats(layer, edit) - passes.base_B) / (S1 - 1)

    nothing_B = torch.zeros(B, dtype=torch.float64)
    off = [
        rise(without(routing, routing.expert_ids == expert)) if counts_E[expert] else nothing_B for expert in range(E)
    ]
    dropped_TK = _even_share(routing, generator)
    order_T = torch.randperm(len(routing.expert_ids), generator=generator).to(routing.expert_ids.device)
    shuffled = replace(routing, expert_ids=routing.expert_ids[order_T], kept=routing.kept[order_T])
    random = RandomRouter(mlp.router, inputs_TD[:_FIT], routing.expert_ids[:_FIT], layer, ranks)
    seen = _look(mlp, inputs_TD, routing) if ranks.size == 1 else None
    experts = []
    for expert, rise_B in enumerate(off):
        looked = (None, None, None) if seen is None else seen.of(expert)
        error = float(rise_B.std() / B**0.5)
        count, share = int(counts_E[expert]), float(counts_E[expert] / counts_E.sum().clamp(min=1))
        experts.append(ExpertWorth(expert, float(rise_B.mean()), error, share, count, *looked))
    return LayerWorth(
        tuple(experts),
        null=float(rise(without(routing, dropped_TK)).mean()),
        shuffled=float(rise(Replay.of(shuffled, weights=True)).mean()),
        random=float(rise(Replay(random(inputs_TD), routing.weights.detach())).mean()),
    )


def _even_share(routing: Routing, generator: torch.Generator) -> Tensor:
    """[T, K] bool: a part 1/E of the pairs, one of a token at most, as an expert takes them."""
    (T, K), E = routing.expert_ids.shape, routing.num_experts
    slot_T = torch.randint(K, (T,), generator=generator)
    taken_T = torch.rand(T, generator=generator) < K / E
    return (taken_T[:, None] & (slot_T[:, None] == torch.arange(K))).to(routing.kept.device)


class _Seen(NamedTuple):
    """What experts say to the same tokens."""

    sizes: list[float]
    twins: list[int]
    distances: list[float]

    def of(self, expert: int) -> tuple[float, int | None, float | None]:
        if len(self.sizes) == 1:
            return self.sizes[expert], None, None
        return self.sizes[expert], self.twins[expert], self.distances[expert]


def _look(mlp: MoELayer, inputs_TD: Tensor, routing: Routing) -> _Seen:
    """All experts on some of the tokens, evenly spread, whoever chose them."""
    E, (T, D) = routing.num_experts, inputs_TD.shape
    few = min(T, _SAMPLE, max(1, _MOST_VALUES // (E * D)))
    rows = torch.linspace(0, T - 1, few, device=inputs_TD.device).long()
    all_TE = torch.arange(E, device=inputs_TD.device).expand(few, E)
    everyone = replace(routing.rows(rows), expert_ids=all_TE, kept=torch.ones_like(all_TE, dtype=torch.bool))
    said_EN = mlp.experts.outputs(inputs_TD[rows], everyone).double().transpose(0, 1).flatten(1)
    products_EE = said_EN @ said_EN.T
    square_E = products_EE.diagonal()
    size_E = (square_E / said_EN.shape[1]).sqrt()
    both_EE = square_E[:, None] + square_E
    distance_EE = (both_EE - 2 * products_EE).clamp(min=0.0) / both_EE.where(both_EE > 0, 1.0)
    distance_EE.fill_diagonal_(float("inf"))
    nearest = distance_EE.min(1)
    sizes_E = size_E / size_E.mean() if bool(size_E.any()) else size_E
    return _Seen(sizes_E.tolist(), nearest.indices.tolist(), nearest.values.tolist())
