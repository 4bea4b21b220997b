"""LoRA beside experts and linear layers, on every kind of base, against W + s·B·A written out in float64.

Forward, and the gradients of x, of the router's weights, of A and of B; one expert has no token. While B is zero
nothing may change. The thin products and the materialised reference are both held.

T tokens, D width, F expert width, E experts, K per token, N outputs, r rank.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from manyhands.check import cases
from manyhands.check.compare import TOLERANCES, close
from manyhands.check.model import DTYPES
from manyhands.check.oracle import float64_copy
from manyhands.check.oracle_records import unpacked
from manyhands.check.parts import expert_output, tolerance_of
from manyhands.check.report import Row, Situation
from manyhands.config import MoEConfig, RouterConfig
from manyhands.config.activation import Activation
from manyhands.config.packing import FORMATS, Format
from manyhands.layers.adapted import AdaptedLinear
from manyhands.layers.linear import Linear
from manyhands.layers.packed_linear import RecordLinear
from manyhands.moe import ExpertBank, Experts, Routing
from manyhands.moe.adapted import AdaptedExperts
from manyhands.moe.packed import RecordExperts
from manyhands.quant import pack_experts, pack_linear

D, N, E, F, K = 48, 24, 5, 32, 2
FEW, MANY = 1, 40
RANKS = (5, 8)
"""One of them has to be padded for the grouped products."""
SCALE = 1.5
BASES = ("stacked", "bfloat16", *FORMATS)
ACTS: tuple[Activation, ...] = ("swiglu", "swiglu_oai", "relu")
Named = dict[str, Tensor]


def adapted_jobs(seed: int, dtypes: list[str]) -> Iterator[tuple[str, str, str, Callable[[], Iterator[Row]]]]:
    """(what, base, dtype, rows) of each kind of base."""
    for base in BASES:
        for dtype in dtypes:
            yield "experts with LoRA", base, dtype, lambda b=base, d=dtype: _experts(seed, b, d)  # type: ignore[misc]
            yield "linear with LoRA", base, dtype, lambda b=base, d=dtype: _linear(seed, b, d)  # type: ignore[misc]


def _experts(seed: int, base: str, dtype: str) -> Iterator[Row]:
    generator = torch.Generator().manual_seed(seed)
    acts = ACTS if dtype == "float32" else ACTS[:1]  # in bfloat16 an input that rounds across a kink moves too much
    for number, act in enumerate(acts):
        bank = _bank(base, act, bias=number > 0, generator=generator)
        up = "up_proj" if act == "relu" else "gate_up_proj"
        r = RANKS[number % 2]
        for how, T in (("auto", FEW), ("auto", MANY), ("eager", MANY)):
            at = Situation("experts with LoRA", "one idle", base, dtype, f"{act}, {how}, {T} rows")
            experts = AdaptedExperts(bank, {up: (r, SCALE), "down_proj": (r, SCALE)})
            x = torch.randn(T, D, generator=generator).to(DTYPES[dtype])
            routing = _routing(T, generator)
            right, _ = _oracle(experts, up, x, routing, gradients=False)
            with torch.no_grad():
                found = {"y": experts(x, routing, how)}
            rounded = TOLERANCES[dtype] if base not in FORMATS else tolerance_of(_format(base), dtype)
            yield close(at, "LoRA that is zero", found, right, tolerance=rounded)
            _stir(experts, generator)
            right, _ = _oracle(experts, up, x, routing, gradients=False)
            with torch.no_grad():  # records are then read natively
                found = {"y": experts(x, routing, how)}
            yield close(at, "experts with LoRA, no gradients", found, right, tolerance=rounded)
            found, leaves = _tested(experts, x, routing, how)
            right, expected = _oracle(experts, up, x, routing)
            yield close(at, "experts with LoRA", found, right)
            yield close(at, "gradients of LoRA", by_expert(leaves), by_expert(expected))
            frozen = tuple(name for name, p in bank.named_parameters() if p.grad is not None)
            yield Row(at, "frozen weights", next(iter(frozen), "none"), float(len(frozen)), 0.0, 1.0, frozen)


def _bank(base: str, act: Activation, *, bias: bool, generator: torch.Generator) -> ExpertBank:
    config = MoEConfig(
        router=RouterConfig(num_experts=E, num_experts_per_tok=K),
        moe_intermediate_size=F, hidden_act=act, expert_bias=bias,
    )  # fmt: skip
    experts = Experts(config, D)
    cases.fill(experts, "random", generator)
    if base == "bfloat16":
        return experts.to(torch.bfloat16)
    if base == "stacked":
        return experts
    packed = pack_experts(experts.weights(), _format(base))
    records = RecordExperts(packed.layout, E)
    records.records = packed.records
    return records


def _format(base: str) -> Format:
    return next(format for format in FORMATS if format == base)


def _routing(T: int, generator: torch.Generator) -> Routing:
    """The last expert gets no token."""
    ids = torch.rand(T, E - 1, generator=generator).argsort(-1)[:, :K]
    weights = torch.rand(T, K, generator=generator) + 0.1
    blank = torch.zeros(T, E)
    return Routing(ids, weights, blank, blank, torch.ones_like(ids, dtype=torch.bool), torch.ones(T, dtype=torch.bool))


@torch.no_grad()
def _stir(module: nn.Module, generator: torch.Generator) -> None:
    """A and B of the size of weights, so that each matters."""
    for name, p in module.named_parameters():
        if name.endswith(("lora_A", "lora_B")):
            p.normal_(0.0, p.shape[-1] ** -0.5, generator=generator)


def _probe(y: Tensor) -> Tensor:
    return (y * torch.linspace(-1.0, 1.0, y.shape[-1]).to(y.dtype)).sum()


@torch.enable_grad()
def _tested(experts: AdaptedExperts, x: Tensor, routing: Routing, how: str) -> tuple[Named, dict[str, Tensor | None]]:
    experts.zero_grad()
    x = x.detach().requires_grad_()
    weights = routing.weights.detach().requires_grad_()
    y = experts(x, replace(routing, weights=weights), how)
    _probe(y).backward()  # type: ignore[no-untyped-call]
    lora = {f"experts.{n}": p.grad for n, p in experts.named_parameters() if "lora_" in n}
    return {"y": y.detach()}, {"x": x.grad, "weights": weights.grad, **lora}


@torch.enable_grad()
def _oracle(
    experts: AdaptedExperts, up: str, x: Tensor, routing: Routing, gradients: bool = True
) -> tuple[Named, dict[str, Tensor | None]]:
    """Every expert for every token, with the weights that its records, or its parameters, stand for."""
    bank = experts.base_layer
    p = unpacked(bank) if isinstance(bank, RecordExperts) else {n: t.detach() for n, t in float64_copy(bank).items()}
    leaves: Named = {"x": x.detach().double().requires_grad_(), "weights": routing.weights.double().requires_grad_()}
    for name in (up, "down_proj"):
        A, B = (getattr(experts, name).get_parameter(leaf).detach().double() for leaf in ("lora_A", "lora_B"))
        leaves[f"experts.{name}.lora_A"], leaves[f"experts.{name}.lora_B"] = A.requires_grad_(), B.requires_grad_()
        p[name] = p[name] + SCALE * torch.einsum("eor,eri->eoi", B, A)
    y = torch.zeros_like(leaves["x"])
    for e in range(E):
        out = expert_output(p, up, e, leaves["x"], bank.activation)
        y = y + (leaves["weights"] * (routing.expert_ids == e)).sum(1, keepdim=True) * out
    if gradients:
        _probe(y).backward()  # type: ignore[no-untyped-call]
    return {"y": y.detach()}, {name: leaf.grad for name, leaf in leaves.items()}


def by_expert(named: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """A and B of each expert by itself: what is exactly zero in the oracle must be zero."""
    apart: dict[str, Tensor | None] = {}
    for name, tensor in named.items():
        if name.startswith("experts.") and tensor is not None:
            apart |= {f"{name}[{e}]": part for e, part in enumerate(tensor)}
        else:
            apart[name] = tensor
    return apart


def _linear(seed: int, base: str, dtype: str) -> Iterator[Row]:
    generator = torch.Generator().manual_seed(seed)
    plain = Linear(D, N)
    cases.fill(plain, "random", generator)
    layer: nn.Module = plain
    if base == "bfloat16":
        plain.to(torch.bfloat16)
    elif base != "stacked":
        record = pack_linear(plain.weight, plain.bias, _format(base))
        layer = held = RecordLinear(record.layout)
        held.record = record.record
    p = unpacked(layer) if base in FORMATS else {n: t.detach() for n, t in float64_copy(plain).items()}
    for r in RANKS:
        for T in (FEW, MANY):
            at = Situation("linear with LoRA", "random", base, dtype, f"rank {r}, {T} rows")
            adapted = AdaptedLinear(layer, r, SCALE)
            x = torch.randn(T, D, generator=generator).to(DTYPES[dtype])
            with torch.enable_grad():  # packed layers round rows where no gradient will come: `parts.py` holds that
                zero = adapted(x.detach().requires_grad_()).detach()
            yield close(at, "LoRA that is zero", {"y": zero}, {"y": x.double() @ p["weight"].T + p["bias"]})
            _stir(adapted, generator)
            with torch.enable_grad():
                own = x.detach().requires_grad_()
                y = adapted(own)
                _probe(y).backward()  # type: ignore[no-untyped-call]
                A, B = (t.detach().double().requires_grad_() for t in (adapted.lora_A, adapted.lora_B))
                wide = x.detach().double().requires_grad_()
                right = wide @ (p["weight"] + SCALE * B @ A).T + p["bias"]
                _probe(right).backward()  # type: ignore[no-untyped-call]
            found = {"y": y.detach(), "x": own.grad, "lora_A": adapted.lora_A.grad, "lora_B": adapted.lora_B.grad}
            expected = {"y": right.detach(), "x": wide.grad, "lora_A": A.grad, "lora_B": B.grad}
            yield close(at, "linear with LoRA", found, expected, tolerance=TOLERANCES[dtype])
