"""The native experts as operators of torch: opcheck, compilation, recomputation, weights that change."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from manyhands.kernels import ExpertWeights, backend_names, native, run_experts
from manyhands.quant import pack_experts, pack_linear

from .dense_oracle import Case, make_case

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no native kernels: {native.missing()}")


def arguments(case: Case) -> tuple[object, ...]:
    return (case.x, case.ids, case.weights, case.kept, *case.experts)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("bias", [False, True])
def test_opcheck_of_experts(bias: bool) -> None:
    case = make_case(9, 20, 24, 3, 2, bias=bias).cast(torch.float32)
    torch.library.opcheck(torch.ops.manyhands.experts.default, (*arguments(case), True, -1, 1))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_opcheck_of_packed_operators() -> None:
    from manyhands.kernels.native.ops import sizes_of

    case = make_case(9, 20, 24, 3, 2)
    packed = pack_experts(case.experts, "int8")
    x, w = case.x.requires_grad_(), case.weights.requires_grad_()
    sizes = sizes_of(packed.layout)
    args = (x, case.ids, w, case.kept, packed.records, sizes, "swiglu", True, -1, 1)
    torch.library.opcheck(torch.ops.manyhands.packed_experts.default, args)
    line = pack_linear(torch.randn(30, 20), None, "int4")
    torch.library.opcheck(
        torch.ops.manyhands.packed_linear.default, (case.x.detach(), line.record, sizes_of(line.layout), -1, 1)
    )


def test_compiled_as_one_graph() -> None:
    case, other = (make_case(9, 20, 24, 3, 2, bias=True).cast(torch.float32) for _ in range(2))

    def layer(case: Case) -> torch.Tensor:
        h = run_experts("native", case.x * 2, case.ids, case.weights, case.kept, case.experts)
        return h.sin()

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    y, expected = compiled(case), layer(other)
    assert torch.equal(y, expected)
    y.sum().backward()
    expected.sum().backward()
    for name, leaf in case.leaves().items():
        torch.testing.assert_close(leaf.grad, other.leaves()[name].grad)


def test_packed_experts_compile() -> None:
    case = make_case(9, 20, 24, 3, 2)
    packed, line = pack_experts(case.experts, "int4"), pack_linear(torch.randn(20, 20), None, "bf16")

    def layer(x: torch.Tensor) -> torch.Tensor:
        return native.linear(native.packed_experts(x, case.ids, case.weights, case.kept, packed), line)

    assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(case.x), layer(case.x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_gives_the_same_gradients(reentrant: bool) -> None:
    case, other = (make_case(9, 20, 24, 3, 2, bias=True).cast(torch.float32) for _ in range(2))

    def layer(x: torch.Tensor, case: Case) -> torch.Tensor:
        return run_experts("native", x, case.ids, case.weights, case.kept, case.experts).sin()

    checkpoint(layer, case.x, case, use_reentrant=reentrant).sum().backward()
    layer(other.x, other).sum().backward()
    for name, leaf in case.leaves().items():
        assert torch.equal(leaf.grad, other.leaves()[name].grad), name


def parameters(seed: int = 0) -> tuple[Case, list[torch.Tensor]]:
    case = make_case(12, 20, 24, 3, 2, bias=True, seed=seed).cast(torch.float32)
    return case, [t for t in case.experts[:4] if t is not None]


def assert_fresh(case: Case) -> None:
    with torch.no_grad():
        got = run_experts("native", case.x, case.ids, case.weights, case.kept, case.experts)
        want = run_experts("eager", case.x, case.ids, case.weights, case.kept, case.experts)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["adamw", "adamw fused", "adamw foreach", "sgd"])
def test_an_optimizer_step_is_seen(kind: str) -> None:
    case, weights = parameters()
    if kind == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(weights, lr=0.1)
    else:
        optimizer = torch.optim.AdamW(weights, lr=0.1, fused="fused" in kind, foreach="foreach" in kind)
    for _ in range(3):
        run_experts("native", case.x, case.ids, case.weights, case.kept, case.experts).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert_fresh(case)


def test_every_in_place_change_is_seen() -> None:
    case, (up, *_) = parameters()
    assert_fresh(case)
    with torch.no_grad():
        up.mul_(2)
    assert_fresh(case)
    with torch.no_grad():
        up[1] = 0
    assert_fresh(case)
    with torch.no_grad():
        up.view(-1)[7] = 3.0
    assert_fresh(case)


def test_reused_memory_is_not_mistaken_for_the_old_weights() -> None:
    """New weights at the address of freed ones."""
    for seed in range(30):
        assert_fresh(make_case(12, 20, 24, 3, 2, seed=seed))


def test_inference_tensors() -> None:
    with torch.inference_mode():
        case = make_case(12, 20, 24, 3, 2)
        assert_fresh(case)
        case.experts.up.mul_(2)
        assert_fresh(case)


def test_a_change_between_forward_and_backward_is_an_error() -> None:
    case, (up, *_) = parameters()
    y = run_experts("native", case.x, case.ids, case.weights, case.kept, case.experts)
    with torch.no_grad():
        up.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_meta_tensors_have_shapes() -> None:
    case = make_case(9, 20, 24, 3, 2)
    meta = [t.to("meta") if isinstance(t, torch.Tensor) else t for t in arguments(case)]
    y, hidden = torch.ops.manyhands.experts(*meta, True, -1, 0)
    assert y.shape == (9, 20) and hidden.shape == (18, 64)


def test_it_is_a_backend() -> None:
    assert "native" in backend_names()
    case = make_case(4, 8, 8, 2, 1)
    assert isinstance(case.experts, ExpertWeights)
