"""A routing that is given: what the router would have done is replayed, forced, masked or swapped.

    out = model(ids)
    model(ids, edit=out.routings)              # the same experts again, their weights from the router's scores
    model(ids, edit={3: Mask((17,))})          # as if expert 17 of layer 3 were off

An edit is a value that a layer's router takes; nothing is hooked, nothing remembered. T tokens, K experts per token,
E experts.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from manyhands.config import RouterConfig
from manyhands.errors import ConfigError
from manyhands.moe.routing import Routing


@dataclass(frozen=True, slots=True, eq=False)
class Replay:
    """The experts that were chosen before, for the same T tokens: a trainer replays a rollout."""

    expert_ids: Tensor
    """[T, K] integers; -1 for no expert. A row of -1 alone was not recorded: there the router decides."""
    weights: Tensor | None = None
    """[T, K]: as recorded, without gradient to the router. None: made from the router's scores of these experts."""
    kept: Tensor | None = None
    """[T, K] bool: what was computed. None: the layer's own capacity decides, if it has one."""

    @staticmethod
    def of(routing: Routing, weights: bool = False) -> "Replay":
        """What a layer returned, to be given back; `weights`: with the weights it had then."""
        given = routing.weights.detach() if weights else None
        return Replay(routing.expert_ids, given, routing.kept)

    def rows(self, tokens: slice | Tensor) -> "Replay":
        """Of some of the tokens."""
        return Replay(*(None if t is None else t[tokens] for t in (self.expert_ids, self.weights, self.kept)))  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Mask:
    """These experts are off: their logits are -inf before the score, and no bias lets them be chosen."""

    experts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Swap:
    """Two experts change places: where `expert` was chosen, `by` computes with its weight, and the other way round."""

    expert: int
    by: int


@dataclass(frozen=True, slots=True)
class Force:
    """Every token goes to these experts, K at most; their weights are made from the router's scores of them."""

    experts: tuple[int, ...]


Edit = Routing | Replay | Mask | Swap | Force
"""Of one layer; a `Routing` is replayed without its weights."""
Edits = Mapping[int, Edit]
"""By layer number; a layer that is not named routes as ever."""

NO_EDITS: Edits = MappingProxyType({})

pytree.register_dataclass(Replay)
for _kind in (Mask, Swap, Force):
    pytree.register_constant(_kind)


def check_edit(edit: Edit, config: RouterConfig) -> None:
    """Raises `ConfigError` for what this router cannot be told; of a replay only the shape is looked at."""
    E, K = config.num_experts, config.num_experts_per_tok
    if config.select != "topk":
        raise ConfigError(f"select = {config.select!r}: only a router that picks the top k experts takes an edit")
    if isinstance(edit, Routing | Replay):
        shape = list(edit.expert_ids.shape)
        if len(shape) != 2 or shape[1] != K or edit.expert_ids.is_floating_point():
            raise ConfigError(f"a replay's expert_ids are {shape}, not integers [tokens, {K}]")
        return
    named = (edit.expert, edit.by) if isinstance(edit, Swap) else edit.experts
    for expert in named:
        if not 0 <= expert < E:
            raise ConfigError(f"there is no expert {expert}: the layer's are numbered from 0 to {E - 1}")
    if isinstance(edit, Mask):
        if (left := fewest_left(edit.experts, config)) < K:
            of = f"of {E}" if config.n_group == 1 else f"in the worst choice of {config.topk_group} groups"
            raise ConfigError(f"without {len(set(named))} experts {left} {of} are left, and a token needs {K}")
    elif len(set(named)) < len(named) or not named:
        raise ConfigError(f"{type(edit).__name__} names experts {list(named)}: give different ones, at least one")
    elif isinstance(edit, Force) and len(named) > K:
        raise ConfigError(f"Force names {len(named)} experts; a token has {K} at most")


def check_edits(edits: Edits, routers: Mapping[int, RouterConfig]) -> None:
    """The same for a model with these sparse layers; the error says which layer."""
    for layer, edit in edits.items():
        if layer not in routers:
            raise ConfigError(f"there is no router in layer {layer}: {_listed(routers)}")
        try:
            check_edit(edit, routers[layer])
        except ConfigError as error:
            raise ConfigError(f"layer {layer}: {error}") from None


def fewest_left(off: Iterable[int], config: RouterConfig) -> int:
    """Experts a token can choose from when these are off, in the groups that leave it fewest."""
    size = config.num_experts // config.n_group
    left = [size] * config.n_group
    for expert in set(off):
        left[expert // size] -= 1
    return sum(sorted(n for n in left if n)[: config.topk_group])


def rows_of(edits: Edits, tokens: slice) -> Edits:
    """The edits for some of the tokens: replays have a row for each, the others are for any."""
    return {layer: edit.rows(tokens) if isinstance(edit, Routing | Replay) else edit for layer, edit in edits.items()}


def replays(edits: Edits) -> bool:
    """Whether any of them is for certain tokens."""
    return any(isinstance(edit, Routing | Replay) for edit in edits.values())


def masked(off: Edit | None, num_experts: int, device: torch.device) -> Tensor | None:
    """[E] bool, true for what is off; None: the edit is no mask."""
    if not isinstance(off, Mask):
        return None
    off_E = torch.zeros(num_experts, dtype=torch.bool, device=device)
    off_E[list(off.experts)] = True
    return off_E


def reroute(
    edit: Edit, ids_TK: Tensor, scores_TE: Tensor, weigh: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Ids and weights [T, K] in the place of the router's own `ids_TK`; and what is kept, if a replay says so.

    `weigh(scores, ids)` makes weights as the router does. Raises `ConfigError` for a replay of other tokens than these.
    """
    if isinstance(edit, Mask):
        return ids_TK, weigh(scores_TE, ids_TK), None
    if isinstance(edit, Swap):
        swapped_TK = ids_TK.where(ids_TK != edit.expert, -2).where(ids_TK != edit.by, edit.expert)
        return swapped_TK.where(swapped_TK != -2, edit.by), weigh(scores_TE, ids_TK), None
    if isinstance(edit, Force):
        row_K = torch.full_like(ids_TK[0], -1) if len(ids_TK) else ids_TK.new_empty(ids_TK.shape[1])
        row_K[: len(edit.experts)] = torch.tensor(edit.experts, device=ids_TK.device)
        given_TK = row_K.expand_as(ids_TK)
        return given_TK, _weigh_given(scores_TE, given_TK, weigh), None
    replay = Replay.of(edit) if isinstance(edit, Routing) else edit
    given_TK = _check_ids(replay, ids_TK, scores_TE.shape[1])
    recorded_T1 = (given_TK >= 0).any(1, keepdim=True)
    given_TK = given_TK.where(recorded_T1, ids_TK)
    weights_TK = _weigh_given(scores_TE, given_TK, weigh)
    if replay.weights is not None:
        weights_TK = replay.weights.to(weights_TK).where(recorded_T1, weights_TK)
    kept_TK = None if replay.kept is None else replay.kept.to(ids_TK.device) | ~recorded_T1
    return given_TK, weights_TK, kept_TK


def _weigh_given(scores_TE: Tensor, ids_TK: Tensor, weigh: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """No expert has score 0, and so no weight."""
    E = scores_TE.shape[1]
    return weigh(F.pad(scores_TE, (0, 1)), ids_TK.where(ids_TK >= 0, E))


def _check_ids(replay: Replay, ids_TK: Tensor, num_experts: int) -> Tensor:
    """[T, K] int64 on the device of `ids_TK`."""
    given_TK = replay.expert_ids.to(ids_TK)
    for name, t in (("expert_ids", given_TK), ("weights", replay.weights), ("kept", replay.kept)):
        if t is not None and t.shape != ids_TK.shape:
            raise ConfigError(
                f"a replay's {name} are {list(t.shape)}, the tokens and their experts {list(ids_TK.shape)}"
            )
    if torch.compiler.is_compiling() or given_TK.device.type == "meta" or not len(given_TK):
        return given_TK
    low, high = int(given_TK.min()), int(given_TK.max())
    if low < -1 or high >= num_experts:
        raise ConfigError(f"a replay holds expert {low if low < -1 else high}; the layer has {num_experts}, from 0 on")
    sorted_TK = given_TK.sort(1).values
    if bool(((sorted_TK[:, 1:] == sorted_TK[:, :-1]) & (sorted_TK[:, 1:] >= 0)).any()):
        raise ConfigError("a replay gives a token one expert twice")
    return given_TK


def _listed(layers: Iterable[int]) -> str:
    numbers = sorted(layers)
    if not numbers:
        return "the model has none"
    together = numbers == list(range(numbers[0], numbers[-1] + 1)) and len(numbers) > 2
    return f"layers {numbers[0]} to {numbers[-1]} have one" if together else f"these have one: {numbers}"
