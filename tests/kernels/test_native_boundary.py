"""Every operator compares what it is given with what it will read: no wrong shape, dtype, device or id gets past."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from manyhands.errors import ConfigError
from manyhands.kernels import ExpertWeights, native, run_experts
from manyhands.kernels.native import ops
from manyhands.kernels.native.library import NativeError
from manyhands.quant import expert_layout, linear_layout, pack_experts, pack_linear

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no native kernels: {native.missing()}")
T, K, E, D, F = 6, 2, 4, 32, 16


def routed() -> dict:
    return {
        "x": torch.randn(T, D), "ids": torch.arange(T * K).view(T, K) % E, "weights": torch.rand(T, K),
        "kept": torch.ones(T, K, dtype=torch.bool),
    }  # fmt: skip


def stacked() -> dict:
    return {
        "up": torch.randn(E, 2 * F, D), "down": torch.randn(E, D, F), "up_bias": torch.randn(E, 2 * F),
        "down_bias": torch.randn(E, D), "activation": "swiglu",
    }  # fmt: skip


def packed() -> dict:
    weights = ExpertWeights(*(v for v in stacked().values()))
    layout = expert_layout(D, F, "swiglu", "int8", 32, gated=True, bias=True)
    return {"records": pack_experts(weights, "int8").records, "sizes": ops.sizes_of(layout), "activation": "swiglu"}


RUN = {"level": -1, "threads": 1}


def calls() -> dict[str, dict]:
    """Right arguments of every operator."""
    hidden, dy = {"hidden": torch.randn(T * K, 2 * F)}, {"dy": torch.randn(T, D)}
    linear = pack_linear(torch.randn(24, D), torch.randn(24), "int4")
    sizes = ops.sizes_of(linear_layout(24, D, "int4", linear.layout.matrices[0].group_size, bias=True))
    return {
        "experts": {**routed(), **stacked(), "save": False, **RUN},
        "experts_backward": {**dy, **routed(), **stacked(), **hidden, "wanted": [True] * 6, **RUN},
        "packed_experts": {**routed(), **packed(), "save": True, **RUN},
        "packed_experts_backward": {**dy, **routed(), **packed(), **hidden, "wanted": [True] * 2, **RUN},
        "packed_linear": {"x": torch.randn(3, D), "record": linear.record, "sizes": sizes, **RUN},
    }


def wrong(t: Tensor, name: str) -> Iterator[tuple[str, Tensor]]:
    """The same, with one thing wrong."""
    for dim in range(t.dim()):
        if not (name == "x" and dim == 0):
            yield f"short in {dim}", t.narrow(dim, 0, t.shape[dim] - 1)
            yield f"long in {dim}", torch.cat((t, t.narrow(dim, 0, 1)), dim)
            yield f"empty in {dim}", t.narrow(dim, 0, 0)
    yield "one dimension more", t[None]
    yield "one dimension less", t.flatten() if t.dim() > 1 else t[0]
    floats = {torch.float16, torch.float64, torch.bfloat16, torch.float32}
    allowed = {torch.bool: {torch.bool}, torch.int64: {torch.int64}, torch.uint8: {torch.uint8}}.get(t.dtype, floats)
    if name in ("x", "dy"):
        allowed = {torch.float32, torch.bfloat16}
    if name == "hidden":
        allowed = {torch.float32}
    for dtype in (*floats, torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64):
        if dtype not in allowed:
            yield f"{dtype}", t.to(dtype)
    yield "sparse", t.to_sparse()


OPERATORS = ["experts", "experts_backward", "packed_experts", "packed_experts_backward", "packed_linear"]


def test_there_is_no_operator_that_is_not_tested() -> None:
    assert {schema.partition("(")[0] for schema in ops._SCHEMAS} == set(OPERATORS)


@pytest.mark.parametrize("dispatched", [True, False])
@pytest.mark.parametrize("name", OPERATORS)
def test_what_is_wrong_is_refused(name: str, dispatched: bool) -> None:
    direct = {"experts": ops.experts, "packed_experts": ops.packed_experts, "packed_linear": ops.packed_linear}
    if not dispatched and name not in direct:
        return
    op = getattr(torch.ops.manyhands, name) if dispatched else direct[name]
    right = calls()[name]
    op(*right.values())
    seen = 0
    for argument, value in right.items():
        if isinstance(value, Tensor):
            for what, bad in wrong(value, argument):
                if argument == "records" and what.endswith("in 0"):
                    continue  # another number of experts: who is asked for decides
                if what == "sparse" and dispatched:
                    continue  # the dispatcher has no kernel for it
                with pytest.raises(ConfigError, match="native kernels"):
                    op(*{**right, argument: bad}.values())
                seen += 1
    assert seen > 15


@pytest.mark.parametrize("name", OPERATORS)
@torch.no_grad()
def test_other_strides_are_the_same_numbers(name: str) -> None:
    op, right = getattr(torch.ops.manyhands, name), calls()[name]
    expected = op(*right.values())
    for argument, value in right.items():
        if isinstance(value, Tensor) and argument not in ("records", "record", "hidden"):
            spaced = torch.stack((value, value), -1)[..., 0]
            assert not spaced.is_contiguous() or spaced.numel() < 2
            for a, b in zip(op(*{**right, argument: spaced}.values()), expected, strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["experts", "experts_backward", "packed_experts", "packed_experts_backward"])
@pytest.mark.parametrize("bad", [-1, E, 2**40])
def test_nobody_who_is_not_there_is_asked(name: str, bad: int) -> None:
    right = calls()[name]
    right["ids"][3, 1] = bad
    with pytest.raises(IndexError, match="expert"):
        getattr(torch.ops.manyhands, name)(*right.values())


@pytest.mark.parametrize("change", [
    {"sizes": [1, 2, 3]}, {"sizes": [F, D, -1, 32, 1, 1]}, {"sizes": [F, D, 99, 32, 1, 1]},
    {"level": 77}, {"threads": -3}, {"activation": "nonsense"},
])  # fmt: skip
def test_numbers_that_are_none(change: dict) -> None:
    with pytest.raises((ConfigError, NativeError)):
        torch.ops.manyhands.packed_experts(*{**calls()["packed_experts"], **change}.values())


def test_short_weights_through_run_experts() -> None:
    """600 rows through weights of half the width: 597 were wrong."""
    right = stacked()
    short = ExpertWeights(right["up"][:, :F], right["down"], None, None, "swiglu")
    ids, kept = torch.zeros(600, 1, dtype=torch.long), torch.ones(600, 1, dtype=torch.bool)
    with pytest.raises(ConfigError, match=r"gate_up_proj is \[4, 16, 32\].*not \[4, 32, 32\]"):
        run_experts("native", torch.randn(600, D), ids, torch.ones(600, 1), kept, short)
    full = ExpertWeights(right["up"], right["down"], None, None, "swiglu")
    with pytest.raises(ConfigError, match=r"kept is .* int64"):
        run_experts("native", torch.randn(600, D), ids, torch.ones(600, 1), kept.long(), full)
