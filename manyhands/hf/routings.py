"""`watch(model)`: the `Routing` of every routed layer of a transformers model.

No family is known by name. A routed layer is a module with `experts` beside a `router` or `gate`: what the experts are
called with is who went where with which weight, the router returns the logits, and the score function is the one it is
seen to call. What cannot be read so is refused with a `ConfigError`.

T tokens, K experts per token, E experts, B batch, S sequence.
"""

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from manyhands.errors import ConfigError
from manyhands.hf.edits import Followed
from manyhands.hf.experts import unwrap
from manyhands.moe import Routing
from manyhands.moe.edit import Edit, Edits

SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "softplus": lambda logits: F.softplus(logits).sqrt(),  # DeepSeek-V4's √softplus
}
_ROUTER = re.compile(r"Top\w*(Router|Gat)")


class _Raw(NamedTuple):
    """One layer's decision as transformers holds it. Made into a `Routing` after the forward: operations inside
    a checkpointed layer would be missed when it is recomputed."""

    ids_TK: Tensor
    weights_TK: Tensor
    logits_TE: Tensor
    score: str


class _ScoreCalls(TorchFunctionMode):
    """Keeps each score function called while active: (name, argument, result)."""

    def __init__(self, followed: Followed | None) -> None:
        super().__init__()
        self.calls: list[tuple[str, Tensor, Tensor]] = []
        self.followed = followed

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if self.followed is None:
            result, argument = func(*args, **kwargs), args[0] if args else kwargs.get("input")
        else:
            result, argument = self.followed.call(func, name, name in SCORES, args, kwargs)
        if name in SCORES:
            self.calls.append((name, argument, result))
        return result


class Seen:
    """What `watch` has seen."""

    def __init__(self, each: Callable[[dict[int, Routing]], None] | None, detach: bool) -> None:
        self.routings: dict[int, Routing] = {}
        """By layer number, in the order the layers ran; of the last forward that finished. Empty before it."""
        self.forwards = 0
        """How many forwards have finished."""
        self._each, self._detach = each, detach
        self._depth = 0
        self._mask: Any = None
        self._current: dict[int, _Raw] = {}

    def _enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depth += 1
        if self._depth == 1:
            self._current = {}
            self._mask = argument(model, args, kwargs, "attention_mask")

    def _leave(self, model: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        self._depth -= 1
        if self._depth:
            return
        current, mask = self._current, self._mask
        self._current, self._mask = {}, None
        if result is None:  # the forward raised
            return
        if not current:
            if any("experts" in part._modules for part in model.modules()):
                raise ConfigError(f"{type(model).__name__}: no routed layer was seen. Was it compiled before watch()?")
            return  # a vision tower, run on its own
        self.routings = {layer: _routing(raw, mask) for layer, raw in current.items()}
        self.forwards += 1
        if self._each is not None:
            self._each(self.routings)


@dataclass
class _Layer:
    """The hooks of one routed layer."""

    seen: Seen
    number: int
    label: str
    block: nn.Module
    router: nn.Module
    experts: nn.Module
    edit: Edit | None = None
    scores: _ScoreCalls | None = None
    followed: Followed | None = None
    output: Any = None

    def hook(self) -> list[Any]:
        return [
            self.router.register_forward_pre_hook(self.before_router),
            self.router.register_forward_hook(self.after_router),
            self.experts.register_forward_pre_hook(self.before_experts, with_kwargs=True),
            self.block.register_forward_hook(self.after_block, always_call=True),
        ]

    def before_router(self, module: nn.Module, args: Any) -> None:
        if self.seen._depth:  # not when a checkpointed layer is recomputed in the backward pass
            self.close()
            if self.edit is not None:
                self.followed = Followed(self.edit, self.label, self.num_experts())
            self.scores = _ScoreCalls(self.followed)
            self.scores.__enter__()  # type: ignore[no-untyped-call]
        elif self.edit is not None:
            raise ConfigError(
                f"{self.label} runs outside of a forward of the model (gradient checkpointing?) with an edit"
            )

    def num_experts(self) -> int:
        """E, by the first dimension of the stacked weights."""
        stacked = [p.shape[0] for p in unwrap(self.experts).parameters(recurse=False) if p.dim() == 3]
        if not stacked:
            raise ConfigError(f"{self.label} has no stacked experts [E, …]: cannot edit it")
        return int(stacked[0])

    def after_router(self, module: nn.Module, args: Any, output: Any) -> None:
        self.output = output

    def before_experts(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if not self.seen._depth:
            return None
        calls = self.close()
        given = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)][1:]
        ids = [t for t in given if not t.is_floating_point()]
        weights = [t for t in given if t.is_floating_point()]
        if len(ids) != 1 or len(weights) != 1 or ids[0].shape != weights[0].shape or ids[0].dim() != 2:
            raise ConfigError(f"{self.label} is not called with expert ids [T, K] and weights [T, K]: cannot watch it")
        if getattr(unwrap(module), "_is_expert_parallel", False):
            raise ConfigError(f"{self.label} is expert-parallel: its ids are those of one rank. Watch it on one device")
        if self.number in self.seen._current:
            raise ConfigError(f"{self.label} runs more than once in a forward: cannot watch it")
        told = (ids[0], weights[0]) if self.followed is None else self.followed.experts(ids[0], weights[0])
        raw = self.read(*told, calls)
        if self.seen._detach:
            raw = raw._replace(weights_TK=raw.weights_TK.detach(), logits_TE=raw.logits_TE.detach())
        self.seen._current[self.number] = raw
        if self.followed is None:
            return None
        instead = {id(ids[0]): told[0], id(weights[0]): told[1]}
        return tuple(instead.get(id(a), a) for a in args), {n: instead.get(id(a), a) for n, a in kwargs.items()}

    def read(self, ids_TK: Tensor, weights_TK: Tensor, calls: list[tuple[str, Tensor, Tensor]]) -> _Raw:
        """The score function is the last one called over the E experts of T tokens, else over the K chosen."""
        logits = self.output[0] if isinstance(self.output, tuple) else self.output
        if not isinstance(logits, Tensor):
            raise ConfigError(f"{self.label}: its router was not seen. Was the model compiled before watch()?")
        E, (T, K) = logits.shape[-1], ids_TK.shape
        over = {n: [call for call in calls if call[1].shape[-1] == n and call[1].numel() == T * n] for n in (E, K)}
        calls = over[E] or over[K]
        if not calls or logits.numel() != T * E:
            raise ConfigError(f"{self.label}: its router shows no logits [T, E] and score function: cannot watch it")
        name, argument, result = calls[-1]
        if result is logits:  # Gemma 4's router returns its scores
            logits = argument
        stacked = [p.shape[0] for p in unwrap(self.experts).parameters(recurse=False) if p.dim() == 3]
        if stacked and stacked[0] != E:
            raise ConfigError(f"{self.label} has {stacked[0]} experts but logits for {E}: cannot watch it")
        logits_TE = logits.reshape(-1, E)
        return _Raw(ids_TK, weights_TK, self.followed.logits(logits_TE) if self.followed else logits_TE, name)

    def close(self) -> list[tuple[str, Tensor, Tensor]]:
        scores, self.scores = self.scores, None
        if scores is None:
            return []
        scores.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        return scores.calls

    def after_block(self, module: nn.Module, args: Any, output: Any) -> None:
        self.close()
        self.output = self.followed = None
        if self.seen._depth and output is not None and self.number not in self.seen._current:
            raise ConfigError(f"{self.label} ran without calling its experts: cannot watch it")


@contextmanager
def watch(
    model: nn.Module,
    each: Callable[[dict[int, Routing]], None] | None = None,
    detach: bool = False,
    edit: Edits | None = None,
) -> Iterator[Seen]:
    """Read the `Routing` of every routed layer of a transformers model in each forward, `generate`'s included.

    `each` is called with {layer number: Routing} after every forward; without it only the last one is kept.
    In the `Routing`, `expert_ids` and `weights` are what the experts were called with (a factor the layer applies
    to their sum is not in it), ordered by score; `logits` and `scores` are the router's; `token_mask` comes from the
    `attention_mask` [B, ≥S] given to the model, all true without one. They carry gradient, so a balance loss of ours
    can be added to theirs, unless `detach` or `torch.no_grad` (which save the memory) or reentrant checkpointing.

    `edit` gives layers, by number, a routing to follow, or changes it (`manyhands.moe.edit`): replay, force, mask,
    swap. The router's own code weighs the given experts. A replay has a row for each of the tokens of one forward.

    `model` may be wrapped (PEFT) or be a part of a model. The hooks go when the block ends; the output is bit-equal
    with and without them. Raises `ConfigError` if there is no routed layer, or one that cannot be read: `experts`
    that are not called with ids and weights, several stacks of layers (watch one: `model.decoder`), expert
    parallelism, a mask of another shape (as `generate` makes for a static cache), a model compiled before; an
    edit of a layer that is not routed or does not pick the top k of its experts, and one under gradient checkpointing.
    """
    from transformers import PreTrainedModel

    seen = Seen(each, detach)
    layers = _find_layers(model, seen)
    edit = edit or {}
    if wrong := sorted(edit.keys() - {layer.number for layer in layers}):
        there = ", ".join(str(layer.number) for layer in layers)
        raise ConfigError(f"{type(model).__name__}: layer {wrong[0]} is not routed; these are: {there}")
    for layer in layers:
        layer.edit = edit.get(layer.number)
    handles: list[Any] = []
    try:
        # All of them, since generate() may call a part alone; not their wrappers, which hide the arguments' names.
        parts: list[nn.Module] = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
        for part in parts or [model]:
            handles.append(part.register_forward_pre_hook(seen._enter, with_kwargs=True))
            handles.append(part.register_forward_hook(seen._leave, always_call=True))
        for layer in layers:
            handles += layer.hook()
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _find_layers(model: nn.Module, seen: Seen) -> list[_Layer]:
    who, layers, stacks = type(model).__name__, [], set()
    routers = {name for name, m in model.named_modules() if _ROUTER.search(type(m).__name__)}
    for name, block in model.named_modules():
        experts = block._modules.get("experts")
        if experts is None:
            continue
        label = f"{who}: {name} ({type(block).__name__})"
        found = next((key for key in ("router", "gate") if block._modules.get(key) is not None), None)
        number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
        inner = unwrap(experts)
        if isinstance(inner, nn.ModuleDict | nn.ModuleList) or len(inspect.signature(inner.forward).parameters) < 3:
            raise ConfigError(f"{label} does not call stacked experts with ids and weights: cannot watch it")
        if found is None or number is None:
            raise ConfigError(f"{label} has experts but no router or layer number: cannot watch it")
        routers = {r for r in routers if not (r + ".").startswith(f"{name}.{found}.")}
        stacks.add(name[: number.start()])
        layers.append(_Layer(seen, int(number[1]), label, block, block._modules[found], experts))
    if routers:
        name = min(routers)
        kind = type(model.get_submodule(name)).__name__
        raise ConfigError(f"{who}: {name} ({kind}) routes, but there are no experts beside it: cannot watch it")
    if not layers:
        raise ConfigError(f"{who} has no routed layer: no module with experts and a router or gate")
    if len(stacks) > 1 or len({layer.number for layer in layers}) < len(layers):
        where = ", ".join(sorted(stack or "layers" for stack in stacks))
        raise ConfigError(f"{who} routes in several stacks or twice in a layer ({where}): watch one part of it")
    return layers


def argument(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """What `model.forward` is given under this name, by keyword or by position."""
    if name in kwargs or not args:
        return kwargs.get(name)
    return inspect.signature(model.forward).bind_partial(*args).arguments.get(name)


def _routing(raw: _Raw, mask: Any) -> Routing:
    logits_TE = raw.logits_TE.float()
    scores_TE = SCORES[raw.score](logits_TE)
    kept_TK = (raw.ids_TK >= 0) & (raw.ids_TK < logits_TE.shape[1])
    ids_TK = raw.ids_TK.long().where(kept_TK, -1)
    chosen_TK = scores_TE.detach().gather(1, ids_TK.clamp(min=0)).where(kept_TK, -1.0)
    order_TK = chosen_TK.argsort(dim=1, descending=True, stable=True)  # theirs may be unsorted: topk(sorted=False)
    return Routing(
        ids_TK.gather(1, order_TK), raw.weights_TK.float().gather(1, order_TK), scores_TE, logits_TE,
        kept_TK.gather(1, order_TK), _token_mask(mask, logits_TE.shape[0]).to(logits_TE.device),
    )  # fmt: skip


def _token_mask(mask: Any, num_tokens: int) -> Tensor:
    """[T] bool from attention_mask [B, cached + S]."""
    if mask is None:
        return torch.ones(num_tokens, dtype=torch.bool)
    if isinstance(mask, Tensor) and mask.dim() == 2 and len(mask):
        S, rest = divmod(num_tokens, len(mask))
        if rest == 0 and mask.shape[1] >= S:
            return mask[:, mask.shape[1] - S :].flatten().bool()
    shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    raise ConfigError(f"attention_mask {shape} says nothing about {num_tokens} routed tokens: give [B, S] or none")
