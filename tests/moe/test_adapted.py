"""Experts with LoRA against W + s·B·A written out in float64, gradients included; and what is kept for the backward
pass."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from manyhands.config.activation import GATED
from manyhands.config.packing import FORMATS
from manyhands.errors import ConfigError
from manyhands.kernels import ExpertWeights, backend_names, run_experts
from manyhands.moe import Routing
from manyhands.moe.adapted import AdaptedExperts
from manyhands.moe.bank import ExpertBank
from manyhands.moe.packed import RecordExperts
from manyhands.quant import PackedExperts, pack_experts

from ..kernels.dense_oracle import Case, compare, make_case, oracle

R, SCALE = 4, 2.0
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 6e-2}
"""Relative to the largest entry: a few hundred roundings in a row; bfloat16 rounds at every one of some ten products
to 2⁻⁹."""


class Stacked(ExpertBank):
    """Stacked weights as they are."""

    def __init__(self, weights: ExpertWeights) -> None:
        super().__init__()
        self.up, self.down = (torch.nn.Parameter(t) for t in weights[:2])
        self.up_bias, self.down_bias = (None if t is None else torch.nn.Parameter(t) for t in weights[2:4])
        self.activation = weights.activation

    num_experts = property(lambda self: self.down.shape[0])
    hidden_size = property(lambda self: self.down.shape[1])

    def in_memory(self) -> ExpertWeights:
        return ExpertWeights(self.up, self.down, self.up_bias, self.down_bias, self.activation)

    def stacked(self, ids) -> ExpertWeights:
        return self.in_memory().stacked(ids)


class Made(Stacked):
    """The same, but never in memory."""

    def in_memory(self) -> None:
        return None

    def stacked(self, ids) -> ExpertWeights:
        return Stacked.in_memory(self).stacked(ids)


def packed(weights: ExpertWeights, format: str) -> RecordExperts:
    records: PackedExperts = pack_experts(weights, format)
    bank = RecordExperts(records.layout, records.num_experts)
    bank.records = records.records
    return bank


def adapted(bank: ExpertBank, r: int = R, only: str | None = None, seed: int = 5) -> AdaptedExperts:
    """LoRA whose B is not zero, so that it matters."""
    up = "gate_up_proj" if bank.activation in GATED else "up_proj"
    names = (up, "down_proj") if only is None else (up if only == "up" else only,)
    experts = AdaptedExperts(bank, dict.fromkeys(names, (r, SCALE)))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for low in experts.low_ranks().values():
            low.lora_A.normal_(0.0, low.lora_A.shape[-1] ** -0.5, generator=g)
            low.lora_B.normal_(0.0, r**-0.5, generator=g)
    return experts


def routing(case: Case) -> Routing:
    E = case.experts.num_experts
    blank = torch.zeros(len(case.ids), E)
    return Routing(case.ids, case.weights, blank, blank, case.kept, torch.ones(len(case.ids), dtype=torch.bool))


def loss(y: Tensor) -> Tensor:
    return (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(99)).to(y.dtype)).sum()


def reference(case: Case, experts: AdaptedExperts) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Float64: W + s·B·A as the weights of the oracle."""
    wide = case.cast(torch.float64)
    base = experts.base_layer.stacked(range(experts.num_experts))
    fixed = [None if t is None else t.detach().double() for t in base[:4]]
    leaves, weights = {"x": wide.x, "weights": wide.weights}, {"up": fixed[0], "down": fixed[1]}
    for name, low in experts.low_ranks().items():
        A, B = (t.detach().double().requires_grad_() for t in (low.lora_A, low.lora_B))
        leaves |= {f"{name}.lora_A": A, f"{name}.lora_B": B}
        which = "down" if name == "down_proj" else "up"
        weights[which] = weights[which] + SCALE * (B @ A)
    y = oracle(Case(wide.x, case.ids, wide.weights, case.kept, ExpertWeights(*weights.values(), *fixed[2:], base[4])))
    loss(y).backward()
    return y.detach(), {name: leaf.grad for name, leaf in leaves.items()}


def assert_as_merged(case: Case, experts: AdaptedExperts, dtype: torch.dtype, how: str = "auto") -> None:
    given = case.cast(dtype)
    rounded = Case(given.x.detach(), case.ids, given.weights.detach(), case.kept, case.experts)
    expected, right = reference(rounded, experts)
    y = experts(given.x, routing(given), how)
    assert y.dtype == dtype
    loss(y).backward()
    tolerance = TOLERANCE[dtype]
    compare("y", y.detach(), expected, tolerance)
    found = {"x": given.x.grad, "weights": given.weights.grad}
    for name, low in experts.low_ranks().items():
        found |= {f"{name}.lora_A": low.lora_A.grad, f"{name}.lora_B": low.lora_B.grad}
    for name, want in right.items():
        grad = found[name]
        assert grad is not None, f"{name} has no gradient"
        compare(name, grad, torch.zeros_like(grad, dtype=torch.float64) if want is None else want, tolerance)
        if name.endswith(("lora_A", "lora_B")):  # an expert without tokens: zero, not small
            idle = set(range(experts.num_experts)) - set(case.ids[case.kept].tolist())
            assert not grad[sorted(idle)].any()
    assert all(p.grad is None for p in experts.base_layer.parameters())
    experts.zero_grad()


CASES = {
    "all experts": {"T": 24, "D": 32, "F": 16, "E": 4, "K": 2},
    "idle experts": {"T": 3, "D": 16, "F": 8, "E": 16, "K": 2},
    "one expert takes all": {"T": 9, "D": 16, "F": 8, "E": 4, "K": 1, "ids": torch.full((9, 1), 2)},
    "dropped pairs": {"T": 12, "D": 16, "F": 8, "E": 4, "K": 3, "drop": 0.4},
    "all dropped": {"T": 4, "D": 16, "F": 8, "E": 4, "K": 2, "drop": 1.1},
    "no token": {"T": 0, "D": 16, "F": 8, "E": 4, "K": 2},
    "biases, as gpt-oss": {"T": 20, "D": 16, "F": 8, "E": 4, "K": 2, "activation": "swiglu_oai", "bias": True},
    "no gate": {"T": 20, "D": 16, "F": 8, "E": 4, "K": 2, "activation": "relu", "bias": True},
    "widths that grouped_mm does not take": {"T": 10, "D": 10, "F": 6, "E": 3, "K": 2, "bias": True},
}


@pytest.mark.parametrize("how", ["auto", "eager"])
@pytest.mark.parametrize("name", CASES)
def test_as_merged_weights(name, how) -> None:
    case = make_case(**CASES[name])
    if name in ("no token", "all dropped") and how == "eager":
        return  # asks for no weights, so that A and B have no gradient there
    assert_as_merged(case, adapted(Stacked(case.experts)), torch.float32, how)
    wide = case.cast(torch.float64)
    assert_as_merged(case, adapted(Stacked(wide.experts)).double(), torch.float64, how)
    if how == "auto" and case.experts.activation == "swiglu":  # the others have kinks, which rounding crosses
        assert_as_merged(case, adapted(Stacked(case.cast(torch.bfloat16).experts)), torch.bfloat16)


@pytest.mark.parametrize("r", [1, 3, 8, 17])
def test_ranks_that_need_padding(r) -> None:
    case = make_case(T=16, D=16, F=8, E=4, K=2)
    for dtype in (torch.float32, torch.bfloat16):
        assert_as_merged(case, adapted(Stacked(case.experts), r), dtype)


@pytest.mark.parametrize("only", ["up", "down_proj"])
def test_one_matrix_alone(only) -> None:
    case = make_case(T=16, D=16, F=8, E=4, K=2, bias=True)
    experts = adapted(Stacked(case.experts), only=only)
    assert len(experts.low_ranks()) == 1
    assert_as_merged(case, experts, torch.float32)


@pytest.mark.parametrize("kind", [*FORMATS, "bfloat16 weights", "made on demand"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_other_bases(kind, dtype) -> None:
    """Packed records, and weights in another dtype: through them a gradient goes as through what they stand for."""
    case = make_case(T=20, D=40, F=24, E=4, K=2, bias=True)
    bank: ExpertBank
    if kind in FORMATS:
        bank = packed(case.experts, kind)
    elif kind == "made on demand":
        bank = Made(case.experts)
    else:
        bank = Stacked(case.experts.cast(torch.bfloat16))
    assert_as_merged(case, adapted(bank), dtype)


ROUNDED = {"int8": 3e-2, "int4": 3e-2, "q8_0": 3e-2, "q4_0": 3e-2, "bf16": 1e-2, "float32": 1e-5}
"""Of the norm: rows beside integers are rounded to 8 bits in groups (docs/check.md); some machines round them beside
bfloat16."""


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("activation", ["swiglu", "relu"])
def test_packed_without_gradients(format, activation) -> None:
    """Read where they lie. Widths that fill no panel, biases, an expert of one row and one of none."""
    case = make_case(T=11, D=72, F=24, E=6, K=2, activation=activation, bias=True)
    experts = adapted(packed(case.experts, format))
    right, _ = reference(case, experts)
    for dtype in (torch.float32, torch.bfloat16):
        x = case.x.detach().to(dtype)
        with torch.no_grad():
            found = experts(x, routing(case))
            alone = torch.cat([experts(x[t : t + 1], routing(one(case, t))) for t in range(len(x))])
            none = experts(x[:0], routing(one(case, 0, 0)))
        limit = max(ROUNDED[format], 2e-2 if dtype == torch.bfloat16 else 0.0)
        for y in (found, alone):
            assert y.dtype == dtype and float((y.double() - right).norm()) <= limit * float(right.norm())
        assert none.shape == (0, 72)


def one(case: Case, t: int, n: int = 1) -> Case:
    """The case of token t alone."""
    rows = slice(t, t + n)
    return Case(case.x[rows], case.ids[rows], case.weights[rows], case.kept[rows], case.experts)


def test_nothing_changes_while_b_is_zero() -> None:
    case = make_case(T=20, D=16, F=8, E=4, K=2, bias=True)
    bank = Stacked(case.experts)
    experts = AdaptedExperts(bank, {"gate_up_proj": (R, SCALE), "down_proj": (R, SCALE)})
    before = bank(case.x, routing(case), "grouped_mm")
    assert torch.equal(experts(case.x, routing(case)), before)
    torch.testing.assert_close(experts(case.x, routing(case)), bank(case.x, routing(case)), atol=1e-6, rtol=1e-6)


def test_gradients_of_gradients() -> None:
    """In float64, where the numbers of `gradgradcheck` mean something, through stacked and through packed weights."""
    case = make_case(T=3, D=4, F=3, E=2, K=1, bias=True)
    for bank in (Stacked(case.cast(torch.float64).experts), packed(case.experts, "int8")):
        experts = adapted(bank, r=1).double()
        wide = case.cast(torch.float64)

        def run(x: Tensor, experts=experts, wide=wide) -> Tensor:
            return experts(x, routing(wide))

        assert torch.autograd.gradgradcheck(run, (wide.x,))


def test_inside_transforms_and_autocast() -> None:
    case = make_case(T=6, D=16, F=8, E=4, K=2)
    experts, r = adapted(Stacked(case.experts)), routing(case)
    plain = torch.autograd.grad(experts(x := case.x.clone().requires_grad_(), r).square().sum(), x)[0]
    there = torch.func.grad(lambda x: experts(x, r).square().sum())(case.x)
    torch.testing.assert_close(there, plain, atol=1e-5, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        y = experts(case.x, r)
    assert y.dtype == torch.float32
    expected, _ = reference(case, experts)
    compare("y", y.detach(), expected, TOLERANCE[torch.bfloat16])


def test_outputs_pair_by_pair() -> None:
    """What the orthogonality loss and `keep_outputs` ask for."""
    case = make_case(T=7, D=16, F=8, E=4, K=2)
    experts, r = adapted(Stacked(case.experts)), routing(case)
    pairs = experts.outputs(case.x, r)
    y = (r.weights[..., None] * r.kept[..., None] * pairs).sum(1)
    torch.testing.assert_close(y, experts(case.x, r), atol=1e-5, rtol=1e-5)


def test_backends_by_name() -> None:
    case = make_case(T=4, D=16, F=8, E=4, K=2)
    experts, r = adapted(Stacked(case.experts)), routing(case)
    assert torch.equal(experts(case.x, r, "grouped_mm"), experts(case.x, r))
    if "native" in backend_names():
        with pytest.raises(ConfigError, match=r"'native' reads weights where they lie.*use 'eager' or 'auto'"):
            experts(case.x, r, "native")
    with pytest.raises(ConfigError, match="'nobody'"):
        experts(case.x, r, "nobody")
    assert experts.in_memory() is None and experts.for_native() is None, "nothing may compute past the adapter"


def kept_bytes(run) -> int:
    """Of the storages that autograd keeps, each once."""
    seen: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = run()
    assert y.requires_grad
    return sum(seen.values())


def big(r: int = 8) -> Iterator[tuple[str, AdaptedExperts, Case]]:
    case = make_case(T=64, D=256, F=128, E=64, K=8)
    given = case.cast(torch.float32)
    yield "stacked", adapted(Stacked(case.experts), r), given
    yield "bfloat16", adapted(Stacked(case.experts.cast(torch.bfloat16)), r), given
    few = make_case(T=16, D=256, F=128, E=16, K=8)
    yield "int4", adapted(packed(few.experts, "int4"), r), few.cast(torch.float32)


def test_memory_kept_for_the_backward_pass() -> None:
    """At most a fifth of what a materialised delta keeps (as PEFT does): for 64 experts and 64 tokens 3.7 MB beside
    the weights themselves, where W + s·B·A is 25 MB more."""
    for name, experts, case in big():
        own = {t.untyped_storage().data_ptr() for t in experts.base_layer.state_dict().values()}
        held = sum(t.untyped_storage().nbytes() for t in experts.base_layer.state_dict().values())
        r = routing(case)
        found = kept_bytes(lambda experts=experts, case=case, r=r: experts(case.x, r))

        def materialised(experts=experts, case=case) -> Tensor:
            weights = experts.stacked(range(experts.num_experts))
            return run_experts("grouped_mm", case.x, case.ids, case.weights, case.kept, weights)

        full = kept_bytes(materialised)
        beside = found - (held if name == "stacked" else 0)  # which grouped_mm holds, and which are there anyway
        assert own and 0 < beside <= 0.2 * full, f"{name}: {beside:,} of {full:,} bytes"
