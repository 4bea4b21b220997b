"""Experts on 2 and 4 processes are the experts of one: by both dispatches, every backend, forward and backward."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from manyhands.config import MoEConfig, RouterConfig
from manyhands.errors import ConfigError
from manyhands.kernels import backend_names
from manyhands.moe import Experts, MoELayer, Router, Routing
from manyhands.moe.exchange import DISPATCHES, Placement, _Trip
from manyhands.moe.packed import RecordExperts
from manyhands.parallel.group import Group
from tests.gloo import on_processes

E, D, F = 8, 32, 16
TOKENS = (16, 24, 8, 40)  # of each rank
FLOAT32 = 5e-6  # of the largest value: sums of D + 2F + K products, 2⁻²⁴ each
FLOAT64 = 1e-13
BFLOAT16 = 3e-2  # sums in another order, each rounded at 2⁻⁸


@dataclass(frozen=True)
class Situation:
    """What is routed, and to whom."""

    router: dict[str, Any] = field(default_factory=dict)
    experts: dict[str, Any] = field(default_factory=dict)
    tokens: tuple[int, ...] = TOKENS
    send: Callable[[Tensor], Tensor] | None = None
    """In the place of the router's ids."""


SITUATIONS = {
    "top-1": Situation({"num_experts_per_tok": 1}),
    "top-2": Situation({"num_experts_per_tok": 2}),
    "all experts, biases": Situation({"num_experts_per_tok": 8}, {"expert_bias": True}),
    "biases, an activation without gate": Situation({}, {"hidden_act": "relu", "expert_bias": True}),
    "capacity": Situation({"capacity_factor": 0.5, "min_capacity": 1}),
    "a second expert or none": Situation({"random_second": True}),
    "experts choose": Situation({"select": "expert_choice"}),
    "positive": Situation({"select": "positive", "score": "relu", "norm_topk_prob": False}),
    "one expert has all": Situation({"num_experts_per_tok": 1}, send=torch.zeros_like),
    "the last process has all": Situation(
        {}, send=lambda ids: torch.tensor([E - 1, E - 2]).expand_as(ids).contiguous()
    ),
    "the first process has no token": Situation({}, tokens=(0, 24, 8, 40)),
    "one token": Situation({}, tokens=(1, 0, 0, 0)),
    "no token": Situation({}, tokens=(0, 0, 0, 0)),
}


@dataclass(frozen=True)
class Run:
    """What a forward and a backward pass left."""

    y: Tensor
    gradients: dict[str, Tensor | None]


def _run(experts: Experts, x: Tensor, routing: Routing, dy: Tensor, keep: bool = False) -> Run:
    x, weights = x.clone().requires_grad_(), routing.weights.detach().clone().requires_grad_()
    if keep:
        y = (weights[..., None] * experts.outputs(x, routing)).sum(1).to(x.dtype)
    else:
        y = experts(x, replace(routing, weights=weights))
    (y * dy).sum().backward()
    named = {"x": x.grad, "weights": weights.grad}
    return Run(y.detach(), named | {name: p.grad for name, p in experts.named_parameters()})


def _experts(situation: Situation, dtype: torch.dtype, backend: str, placement: Placement | None) -> Experts:
    """With the same weights whatever the placement."""
    config = MoEConfig(router=_router(situation), moe_intermediate_size=F, **situation.experts)
    whole, experts = Experts(config, D), Experts(config, D, backend, placement)
    generator = torch.Generator().manual_seed(1)
    rows = slice(None) if placement is None else slice(placement.first, placement.first + placement.count)
    with torch.no_grad():
        for (_, p), (_, own) in zip(whole.named_parameters(), experts.named_parameters(), strict=True):
            own.copy_(p.normal_(0.0, 0.3, generator=generator)[rows])
    return experts.to(dtype)


def _router(situation: Situation) -> RouterConfig:
    return RouterConfig(**{"num_experts": E, "num_experts_per_tok": 2} | situation.router)


def _given(situation: Situation, size: int) -> tuple[Tensor, Routing, Tensor, list[slice]]:
    """Tokens, their routing, gradients, and which tokens are whose; the same on every process."""
    tokens, T = situation.tokens[:size], sum(situation.tokens[:size])
    generator = torch.Generator().manual_seed(2)
    x, dy = (torch.randn(T, D, generator=generator) for _ in range(2))
    torch.manual_seed(3)
    router = Router(_router(situation), D)
    torch.nn.init.normal_(router.weight)
    routing = router(x, torch.rand(T) > 0.1)
    if situation.send is not None:
        routing = replace(routing, expert_ids=situation.send(routing.expert_ids))
    ends = torch.tensor((0, *tokens)).cumsum(0).tolist()
    return x, routing, dy, [slice(a, b) for a, b in pairwise(ends)]


def _differences(ranks: Group, found: Run, whole: Run, mine: slice) -> Iterator[tuple[str, float]]:
    """Of what this process has, relative to the largest value that the whole has."""
    count = E // ranks.size
    own = slice(ranks.rank * count, ranks.rank * count + count)
    assert all(g is not None for g in found.gradients.values()), "idle experts have zero gradients, not none"
    pairs = {"y": (found.y, whole.y[mine])}
    for name, gradient in found.gradients.items():
        full = whole.gradients[name]
        assert gradient is not None and full is not None
        pairs[name] = gradient, full[mine if name in ("x", "weights") else own]
    for name, (got, right) in pairs.items():
        assert got.shape == right.shape
        largest = float((whole.y if name == "y" else whole.gradients[name]).abs().max()) if whole.y.numel() else 1.0  # type: ignore[union-attr]
        yield name, float((got.double() - right.double()).abs().max()) / (largest or 1.0) if got.numel() else 0.0


def _compare(ranks: Group) -> list[tuple[str, float, float]]:
    """(what, error, limit) of everything."""
    rows = []
    for name, situation in SITUATIONS.items():
        x, routing, dy, parts = _given(situation, ranks.size)
        mine = parts[ranks.rank]
        whole = _run(_experts(situation, torch.float64, "eager", None), x.double(), routing, dy.double())
        ways = [("eager", torch.float64, FLOAT64, keep) for keep in (False, True)]
        for dtype, limit in ((torch.float32, FLOAT32), (torch.bfloat16, BFLOAT16)):
            ways += [(backend, dtype, limit, False) for backend in backend_names() if backend != "eager"]
        for backend, dtype, limit, keep in ways:
            right = whole
            if dtype == torch.bfloat16:  # rounded alike, so that no ReLU changes its mind
                right = _run(_experts(situation, dtype, backend, None), x.to(dtype), routing, dy.to(dtype))
            for dispatch in DISPATCHES:
                placement = Placement.even(ranks.group, E, dispatch)  # type: ignore[arg-type]
                own = x[mine].to(dtype), routing.rows(mine), dy[mine].to(dtype)
                found = _run(_experts(situation, dtype, backend, placement), *own, keep)
                what = f"{name}, {dispatch}, {backend}, {dtype}{', outputs' * keep}"
                rows += [(f"{what}: {of}", error, limit) for of, error in _differences(ranks, found, right, mine)]
    return rows


@pytest.mark.parametrize("size", [4])
def test_as_one_process(size: int) -> None:
    rows = [row for rank in on_processes(size, _compare) for row in rank]
    assert len(rows) > 400 * size
    wrong = [f"{what}: {error:.1e} of {limit:.1e}" for what, error, limit in rows if not error <= limit]
    assert not wrong, f"{len(wrong)} of {len(rows)}: " + "; ".join(wrong[:8])


def _exact(ranks: Group) -> list[str]:
    """Where `grouped_mm` gave other bits."""
    placement, wrong = Placement.even(ranks.group, E), []
    for name, situation in SITUATIONS.items():
        x, routing, _, parts = _given(situation, ranks.size)
        for dtype in (torch.float32, torch.bfloat16):
            one, placed = (_experts(situation, dtype, "grouped_mm", where) for where in (None, placement))
            with torch.no_grad():
                right = one(x.to(dtype), routing)[parts[ranks.rank]]
                found = placed(x[parts[ranks.rank]].to(dtype), routing.rows(parts[ranks.rank]))
            if not torch.equal(found, right):
                wrong.append(f"{name}, {dtype}")
    return wrong


@pytest.mark.parametrize("size", [2, 4])
def test_pairs_through_grouped_mm_are_bit_equal(size: int) -> None:
    assert on_processes(size, _exact) == [[]] * size


def _counted(patched: pytest.MonkeyPatch) -> list[int]:
    """The rows of tokens that every exchange from here on sends."""
    real, counts = torch.distributed.all_to_all_single, list[int]()

    def counting(out: Tensor, rows: Tensor, *args: Any, **kwargs: Any) -> Any:
        if rows.dtype == torch.float32 and rows.shape[1:] == (D,):
            counts.append(len(rows))
        return real(out, rows, *args, **kwargs)

    patched.setattr(torch.distributed, "all_to_all_single", counting)
    return counts


def _rows_sent(ranks: Group) -> tuple[int, int]:
    """Values that leave this process on the way there, by pairs and by tokens."""
    x, routing, _, parts = _given(SITUATIONS["all experts, biases"], ranks.size)
    mine, sent, monkeypatch = parts[ranks.rank], [], pytest.MonkeyPatch()
    for dispatch in ("by_pairs", "by_tokens"):
        placement = Placement.even(ranks.group, E, dispatch)  # type: ignore[arg-type]
        experts = _experts(SITUATIONS["all experts, biases"], torch.float32, "eager", placement)
        with monkeypatch.context() as patched:
            counts = _counted(patched)
            experts(x[mine], routing.rows(mine))
        sent.append(counts[0])
    return sent[0], sent[1]


def test_a_token_travels_once_to_each_process() -> None:
    for tokens, (pairs, once) in zip(TOKENS, on_processes(2, _rows_sent), strict=False):
        assert (pairs, once) == (tokens * E, tokens * 2)


def _in_what_order(ranks: Group) -> list[str]:
    """What a layer does while its tokens travel, and while their gradients do."""
    config = MoEConfig(router=_router(SITUATIONS["top-2"]), moe_intermediate_size=F, n_shared_experts=1)
    layer = MoELayer(
        config, D, experts=_experts(SITUATIONS["top-2"], torch.float32, "eager", Placement.even(ranks.group, E))
    )
    alone, seen = MoELayer(config, D, experts=_experts(SITUATIONS["top-2"], torch.float32, "eager", None)), list[str]()
    for name, p in alone.named_parameters():
        if not name.startswith("experts."):
            layer.get_parameter(name).data.copy_(p.data.normal_(generator=torch.Generator().manual_seed(5)))
    assert layer.shared_experts is not None
    layer.shared_experts.register_forward_hook(lambda *_: seen.append("shared"))
    layer.shared_experts.register_full_backward_hook(lambda *_: seen.append("shared's gradient"))
    patch, depart, wait = pytest.MonkeyPatch(), _Trip.depart, _Trip.wait
    patch.setattr(_Trip, "depart", lambda trip, rows, back=False: [seen.append("departs"), depart(trip, rows, back)][1])
    patch.setattr(_Trip, "wait", lambda trip: [seen.append("arrives"), wait(trip)][1])
    x = torch.randn(8, D, generator=torch.Generator().manual_seed(ranks.rank))
    y, _ = layer(x.requires_grad_())
    y.sum().backward()
    with torch.no_grad():
        assert float((y - alone(x)[0]).abs().max()) < FLOAT32 * float(y.detach().abs().max())
    patch.undo()
    return seen


def test_shared_experts_work_while_tokens_travel() -> None:
    there, back = ["departs", "shared", "arrives"], ["departs", "shared's gradient", "arrives"]
    assert on_processes(2, _in_what_order) == [[*there, "departs", "arrives", "departs", "arrives", *back]] * 2


def _refused(ranks: Group) -> str:
    with pytest.raises(ConfigError, match=r"parallel\.ep = 2 does not divide the 7 experts"):
        Placement.even(ranks.group, 7)
    bank = RecordExperts.__new__(RecordExperts)
    torch.nn.Module.__init__(bank)
    bank.placement = Placement.even(ranks.group, E)
    with pytest.raises(ConfigError) as refused:
        bank.own_experts()
    return str(refused.value)


def test_what_cannot_be_shared_out_says_so() -> None:
    assert on_processes(2, _refused) == ["parallel.ep: RecordExperts cannot lie on several processes"] * 2
