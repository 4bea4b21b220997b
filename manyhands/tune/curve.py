"""Ways to shrink a mixture, run beside the whole model on the same text, one layer in memory at a time.

Each way is an arm: so many experts, chosen by a measure, by chance, or the wrong way round. Every arm has states of its
own on the rows that are measured; what experts are worth is seen on rows to calibrate with, which the whole model runs.
An arm that merges as REAM does is calibrated on what its own earlier layers give.

B sequences, S tokens each, D model width, E experts, N of them kept.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from manyhands.config import RouterConfig
from manyhands.models.decoder import Block
from manyhands.moe import Experts, MoELayer, Routing
from manyhands.tune.by_layer import ByLayer, block_of
from manyhands.tune.importance import By, Seen, random_score
from manyhands.tune.keep import PARTS, Group, alone, best, fewer, shrunk
from manyhands.tune.merge import MOST_TOKENS, Likeness, Merge, likeness, merged

TOKENS = 2048
"""That are run at once where all outputs are kept."""


@dataclass(slots=True)
class Arm:
    """One way to shrink."""

    num_experts: int
    how: Literal["chosen", "not merged", "random", "reversed"]
    by: By
    seed: int = 0
    merge: Merge | None = None
    states: list[Tensor] = field(default_factory=list)
    """[B, S, D] of the rows that are measured, behind the layers so far; and of its own calibration rows, if it has."""
    groups: dict[int, list[Group]] = field(default_factory=dict)
    nats: float = 0.0
    """Mean cross entropy on the measured rows."""


@dataclass(frozen=True, slots=True)
class Watched:
    """What calibration rows say of a layer."""

    seen: Seen
    alike: Likeness | None


def run_arms(
    model: ByLayer,
    arms: list[Arm],
    calibration_BS: Tensor,
    ids_BS: Tensor,
    targets_BS: Tensor,
    given: Mapping[int, Tensor] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> float:
    """Fill the arms' `groups` and `nats`; returns the whole model's mean cross entropy on the same rows.

    `given` are scores by layer that were found otherwise (a trace); then nothing is calibrated. No rows to measure:
    groups alone, and NaN.
    """
    whole, calibrating = model.embed(ids_BS) if len(ids_BS) else None, None
    if len(calibration_BS):
        calibrating = model.embed(calibration_BS)
    for arm in arms:
        arm.states = [] if whole is None else [whole]
        if arm.merge == "ream" and calibrating is not None:
            arm.states.append(calibrating)
    for layer, block in model.blocks():
        if progress is not None:
            progress(f"layer {layer}", layer, model.config.num_hidden_layers)
        watched = None
        if calibrating is not None:
            calibrating, watched = _watch(model, block, calibrating, calibration_BS, arms)
        for arm in arms:
            small = block
            if isinstance(block.mlp, MoELayer):
                own = watched
                if arm.merge == "ream" and calibrating is not None:
                    _, own = _watch(model, block, arm.states[-1], calibration_BS, [arm])
                arm.groups[layer] = _groups(arm, layer, block.mlp, own, None if given is None else given[layer])
                if arm.states:
                    small = shrunk_block(model, layer, block, arm.groups[layer])
            rows = [ids_BS] * (whole is not None) + [calibration_BS]
            arm.states = [_forward(model, small, x, ids) for x, ids in zip(arm.states, rows, strict=False)]
        if whole is not None:
            whole = _forward(model, block, whole, ids_BS)
    if whole is None:
        return float("nan")
    for arm in arms:
        arm.nats = model.nats(arm.states[0], targets_BS)
        arm.states = []
    return model.nats(whole, targets_BS)


def shrunk_block(model: ByLayer, layer: int, block: Block, groups: list[Group]) -> Block:
    """The same block with these experts alone."""
    config = fewer(model.config, len(groups))
    state: dict[str, Tensor] = dict(block.state_dict())
    E = len(state["mlp.router.weight"])
    for name, tensor in state.items():
        if name.startswith(tuple(f"mlp.{part}" for part in PARTS)) and tensor.shape[:1] == (E,):
            state[name] = shrunk(name, groups, tensor.__getitem__)
    return block_of(config, layer, state, model.implementation)


def _forward(model: ByLayer, block: Block, x_BSD: Tensor, ids_BS: Tensor) -> Tensor:
    return torch.cat([model.run(block, x, ids)[0] for x, ids in _some_rows(x_BSD, ids_BS)])


def _some_rows(x_BSD: Tensor, ids_BS: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    rows = max(1, TOKENS // ids_BS.shape[1])
    yield from zip(torch.split(x_BSD, rows), torch.split(ids_BS, rows), strict=True)


def _watch(
    model: ByLayer, block: Block, x_BSD: Tensor, ids_BS: Tensor, arms: list[Arm]
) -> tuple[Tensor, Watched | None]:
    """The block run on calibration rows, and what they say of its experts."""
    mlp = block.mlp
    if not isinstance(mlp, MoELayer):
        return _forward(model, block, x_BSD, ids_BS), None
    seen = Seen.nothing(mlp.router.config.num_experts)
    states: list[Tensor] = []
    routings: list[Routing] = []
    inputs: list[Tensor] = []

    def look(_: Any, arguments: tuple[Any, ...]) -> None:
        if sum(map(len, inputs)) < MOST_TOKENS:  # more are not looked at
            inputs.append(arguments[0].flatten(0, 1))

    handle = mlp.register_forward_pre_hook(look)
    try:
        for x, ids in _some_rows(x_BSD, ids_BS):
            y, routing = model.run(block, x, ids, keep_outputs=True)
            assert routing is not None
            seen.add(routing)
            states.append(y)
            routings.append(_without_outputs(routing))
    finally:
        handle.remove()
    alike = None
    if merging := {arm.merge for arm in arms} - {None}:
        assert isinstance(mlp.experts, Experts)
        alike = likeness(torch.cat(inputs), Routing.cat(routings), mlp.experts if "ream" in merging else None)
    return torch.cat(states), Watched(seen, alike)


def _without_outputs(routing: Routing) -> Routing:
    return Routing(*(getattr(routing, n) for n in ("expert_ids", "weights", "scores", "logits", "kept", "token_mask")))


def keep_by(arm: Arm, layer: int, router: RouterConfig, score_E: Tensor) -> list[Group]:
    """The experts of the best scores, or of the worst, or by chance, alone."""
    return alone(_kept(arm, layer, router, score_E)[0])


def _kept(arm: Arm, layer: int, router: RouterConfig, score_E: Tensor) -> tuple[list[int], Tensor]:
    if arm.how == "random" or arm.by == "random":
        score_E = random_score(router.num_experts, arm.seed, layer)
    return best(-score_E if arm.how == "reversed" else score_E, arm.num_experts, router.n_group), score_E


def _groups(arm: Arm, layer: int, mlp: MoELayer, watched: Watched | None, given_E: Tensor | None) -> list[Group]:
    router = mlp.router.config
    if given_E is None:
        assert watched is not None
        given_E = watched.seen.score("reap" if arm.by == "random" else arm.by)
    kept, score_E = _kept(arm, layer, router, given_E)
    if arm.merge is None:
        return alone(kept)
    assert watched is not None and watched.alike is not None and isinstance(mlp.experts, Experts)
    weights = mlp.experts.weights()
    return merged(arm.merge, kept, score_E, watched.seen, watched.alike, router.n_group, weights)
