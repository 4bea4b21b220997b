"""What decoding is made of, part by part, at row counts on both sides of every threshold.

Routing of few tokens, norms, linear layers, packed layers and packed experts, and the records themselves.

T tokens, D width, F expert width, E experts.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor, nn

from manyhands.check import cases
from manyhands.check.compare import TOLERANCES, Tolerance, close, exact
from manyhands.check.model import DTYPES, routing_rows
from manyhands.check.oracle import activation, float64_copy
from manyhands.check.oracle_attention import layer_norm, rms_norm
from manyhands.check.oracle_dense import RouterWeights
from manyhands.check.oracle_records import unpacked
from manyhands.check.oracle_routing import route
from manyhands.check.report import Row, Situation
from manyhands.check.routers import ROUTERS
from manyhands.config.packing import FORMATS, TRAITS, Format
from manyhands.kernels import ExpertWeights
from manyhands.kernels.native import step
from manyhands.layers.linear import Linear
from manyhands.layers.norm import LayerNorm, RMSNorm
from manyhands.layers.packed_linear import RecordLinear
from manyhands.moe import Router, Routing
from manyhands.moe.packed import RecordExperts
from manyhands.quant import pack_experts, pack_linear
from manyhands.runtime.builder import Unfit
from manyhands.runtime.claims.route import router_of

COUNTS = (1, 3, 8, 16, 17, 32, 33, 48, 49)
"""Rows: one on each side of every number at which a kernel hands over to another."""
PLENTY = 160
"""So many that every expert has several tiles of rows."""
D, N, E, F, K = 80, 48, 4, 48, 2
ROUNDED = Tolerance(error=3e-2, floor=2e-2, by_norm=True, cosine=0.999, slack=5e-2)
"""Rows beside int8 and int4 weights are rounded to 8 bits in groups of at most 64 inputs: steps of
max/127, max ≈ 2.5 standard deviations, so an error of 2.5/127/√12 = 0.57 % of the input, and of the output; twice in
an expert, whose activation at most doubles it: 1.7 %, and as much again for single rows with one large input."""
SLOPE = 1e-2
"""Rounding has no direction. Along the oracle's output it averages out over inputs and rows, to 0.6 %/√48 per row
(three and more are looked at). So a factor on some or all of it shows where the error by itself would hide it."""
ONCE = Tolerance(error=1e-2, floor=2e-2, by_norm=True, cosine=0.999, slack=5e-2)
"""One product or norm in bfloat16: the result is rounded to 8 bits, at most 2⁻⁹ = 0.2 %, and a bias before it."""
ACTS = ("swiglu", "gelu", "swiglu_oai", "geglu")


def tolerance_of(format: Format, dtype: str) -> Tolerance:
    """How near records of a format must come to the oracle that reads the same record."""
    if TRAITS[format].scale is not None:
        return ROUNDED if dtype == "float32" else TOLERANCES["bfloat16"]
    return TOLERANCES["bfloat16" if format == "bf16" else dtype]  # where a machine rounds rows beside bf16


def part_jobs(seed: int, dtypes: list[str]) -> Iterator[tuple[str, str, Callable[[], Iterator[Row]]]]:
    """(what, dtype, rows) of each part."""
    for dtype in dtypes:
        yield "routing of few tokens", dtype, lambda d=dtype: _routing(seed, d)  # type: ignore[misc]
        yield "norms and linears", dtype, lambda d=dtype: _plain(seed, d)  # type: ignore[misc]
        for format in FORMATS:
            yield f"{format} records", dtype, lambda f=format, d=dtype: _packed(seed, f, d)  # type: ignore[misc]


@torch.no_grad()
def _routing(seed: int, dtype: str) -> Iterator[Row]:
    for name, config in ROUTERS.items():
        for case in ("random", "tied"):
            if not config.causal_safe or not cases.possible(case, config):
                continue  # what does not decode has few tokens as a layer (`sizes.py`)
            router = Router(config, D).eval()
            cases.fill(router, case, torch.Generator().manual_seed(seed))
            p = float64_copy(router)
            weights = RouterWeights(
                p["weight"],
                p.get("e_score_correction_bias"),
                None,
                p.get("bias"),
                group_weight=p.get("group_weight"),
            )
            for T in COUNTS:
                at = Situation(name, case, "router", dtype, f"decode, {T} tokens")
                generator = torch.Generator().manual_seed(seed + T)
                x = cases.tokens(T, D, case, generator).to(DTYPES[dtype])
                ids, mask = torch.randint(97, (T,), generator=generator), torch.ones(T, dtype=torch.bool)
                for tested in _routings(router, x, mask, ids):
                    oracle = route(
                        x.double(), weights, config, training=False, mask_T=mask, ids_T=ids, generator=generator,
                        tested=tested, slack=TOLERANCES["float32"].slack,
                    )  # fmt: skip
                    # the router is float32 whatever the model is
                    quantities = (at, [{0: tested}], [{0: oracle}], "router.", "routing of few tokens: ")
                    yield from routing_rows(*quantities, TOLERANCES["float32"])


def _routings(router: Router, x: Tensor, mask: Tensor, ids: Tensor) -> Iterator[Routing]:
    """As the module routes, and as decoding does where it has a claim to that."""
    yield router(x, mask, ids)
    if step.direct(x):
        with suppress(Unfit):
            logits, scores, chosen, w = step.route(router_of(router, x.shape[1]), x)
            yield Routing(chosen, w, scores, logits, torch.ones_like(chosen, dtype=torch.bool), mask)


@torch.no_grad()
def _plain(seed: int, dtype: str) -> Iterator[Row]:
    """Layers of the model's own kinds, with and without biases, whose weights are not packed."""
    generator = torch.Generator().manual_seed(seed)
    norm, other = RMSNorm(D, 1e-2), LayerNorm(D, 1e-2)
    layers = {"linear": Linear(D, N, bias=False), "linear, bias": Linear(D, N)}
    for module in (norm, other, *layers.values()):
        cases.fill(module, "random", generator)
        module.to(DTYPES[dtype])
    tolerance = ONCE if dtype == "bfloat16" else None
    for counts, when in ((COUNTS, ""), ((1, 16, 17), ", new weights")):
        if when:  # in place: nothing that was prepared from the old ones may be left
            for module in (norm, other, *layers.values()):
                cases.fill(module, "random", generator)
        for T in counts:
            x = torch.randn(T, D, generator=generator).to(DTYPES[dtype])
            at = Situation("parts", "random", "plain", dtype, f"decode, {T} rows{when}")
            normed = rms_norm(x.double(), norm.weight.double(), 1e-2)
            yield close(at, "norm", {"norm": norm(x)}, {"norm": normed}, tolerance=tolerance)
            normed = layer_norm(x.double(), other.weight.double(), other.bias.double(), 1e-2)
            yield close(at, "layer norm", {"norm": other(x)}, {"norm": normed}, tolerance=tolerance)
            right = {n: _linear(x.double(), float64_copy(layer)) for n, layer in layers.items()}
            found = {n: layer(x) for n, layer in layers.items()}
            yield close(at, "linears", found, right, tolerance=tolerance)


def _linear(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    y = x @ p["weight"].detach().T
    return y + p["bias"].detach() if "bias" in p else y


@torch.no_grad()
def _packed(seed: int, format: Format, dtype: str) -> Iterator[Row]:
    generator = torch.Generator().manual_seed(seed)
    groups = TRAITS[format].groups
    for number, group in enumerate((32, 64) if len(groups) > 1 else (32, 32)):
        for act in ACTS[number * 2 : number * 2 + 2]:
            label = f"{format} in groups of {group}" if len(groups) > 1 else format
            at = Situation("parts", "random", label, dtype, act)
            weights = _stacked(act, bias=number == 1, generator=generator)
            packed = pack_experts(weights, format, group)
            experts = RecordExperts(packed.layout, E)
            experts.records = packed.records
            rows = _records(at, experts, weights, format, group)
            w, b = torch.randn(N, D, generator=generator), torch.randn(N, generator=generator)
            linear_packed = pack_linear(w, b if number else None, format, group)
            linear = RecordLinear(linear_packed.layout)
            linear.record = linear_packed.record
            yield from rows
            yield from _applied(at, experts, linear, format, generator)


def _stacked(act: str, *, bias: bool, generator: torch.Generator) -> ExpertWeights:
    rows = F if act in ("gelu", "relu") else 2 * F

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).mul_(float(shape[-1]) ** -0.5)

    up_bias, down_bias = (draw(E, rows), draw(E, D)) if bias else (None, None)
    return ExpertWeights(draw(E, rows, D), draw(E, D, F), up_bias, down_bias, act)


def _records(at: Situation, experts: RecordExperts, weights: ExpertWeights, format: Format, group: int) -> list[Row]:
    """What a record stands for, read twice; and that packing rounded no worse than plain rounding does."""
    mine = unpacked(experts)
    up = "gate_up_proj" if weights.up.shape[1] == 2 * F else "up_proj"
    theirs = dict(zip((up, "down_proj", f"{up}_bias", "down_proj_bias"), experts.packed.dequantize(), strict=True))
    found = {name: theirs[name] for name in mine}
    rows = [exact(at, "packed records", found, {name: t.float() for name, t in mine.items()})]  # type: ignore[arg-type]
    errors = {}
    for name, original in ((up, weights.up), ("down_proj", weights.down)):
        allowed = (original - _plain_rounding(original, format, group)).double().norm()
        errors[name] = (
            float((mine[name] - original).norm() / allowed) if allowed else float((mine[name] - original).any())
        )
    worst = max(errors, key=lambda name: errors[name])
    limit = 1.0 + 1e-5
    failing = tuple(name for name, error in errors.items() if not error <= limit)
    return [*rows, Row(at, "rounding (plain rounding is 1)", worst, errors[worst], limit, 1.0, failing)]


def _plain_rounding(w: Tensor, format: Format, group: int) -> Tensor:
    """To the nearest of evenly spaced values, the largest of each row or group being one of them."""
    if format == "float32":
        return w
    if format == "bf16":
        return w.bfloat16().float()
    low, high = (-127, 127) if TRAITS[format].bits == 8 else (-8, 7)
    grouped = TRAITS[format].grouped
    size = group if grouped else w.shape[-1]
    padded = nn.functional.pad(w, (0, -w.shape[-1] % size))
    padded = padded.view(*padded.shape[:-1], -1, size)
    largest = padded.gather(-1, padded.abs().argmax(-1, keepdim=True))
    scale = largest / low
    if grouped:
        scale = scale.to(torch.bfloat16 if TRAITS[format].scale == "bf16" else torch.float16).float()
    q = torch.where(scale == 0, 0.0, padded / torch.where(scale == 0, 1.0, scale)).round().clamp(low, high)
    rounded: Tensor = (q * scale).flatten(-2)[..., : w.shape[-1]]
    return rounded


def expert_output(p: dict[str, Tensor], up: str, e: int, x: Tensor, act: str) -> Tensor:
    """[T, D] -> [T, D]: one expert of a stack, float64."""
    h = x @ p[up][e].T
    h = activation(h + p[up + "_bias"][e] if up + "_bias" in p else h, act)
    y = h @ p["down_proj"][e].T
    return y + p["down_proj_bias"][e] if "down_proj_bias" in p else y


def _applied(
    at: Situation, experts: RecordExperts, linear: RecordLinear, format: Format, generator: torch.Generator
) -> Iterator[Row]:
    p, q = unpacked(experts), unpacked(linear)
    tolerance = tolerance_of(format, at.dtype)
    up = next(name for name in p if name.endswith("up_proj"))
    act = at.mode
    for T in (*COUNTS, PLENTY):
        here = Situation(at.scope, at.case, at.backend, at.dtype, f"{act}, {T} rows")
        x = torch.randn(T, D, generator=generator).to(DTYPES[at.dtype])
        found = {"decoding": linear(x)}
        with torch.enable_grad():  # which another kernel computes
            found["with gradients on"] = linear(x)
        right = dict.fromkeys(found, _linear(x.double(), q))
        yield close(here, "packed linears", found, right, tolerance=tolerance)
        if T >= 3:
            yield _slope(here, "packed linears: slope", found, right)
        ids = torch.rand(T, E, generator=generator).argsort(-1)[:, :K]
        weights = torch.rand(T, K, generator=generator)
        blank, mask = torch.zeros(T, E), torch.ones(T, dtype=torch.bool)
        routing = Routing(ids, weights, blank, blank, torch.ones_like(ids, dtype=torch.bool), mask)
        total = torch.zeros(T, D, dtype=torch.float64)
        for e in range(E):
            y = expert_output(p, up, e, x.double(), act)
            total += (weights.double() * (ids == e)).sum(1, keepdim=True) * y
        y = experts(x, routing)
        yield close(here, "packed experts", {"y": y}, {"y": total}, tolerance=tolerance)
        if T >= 3:
            yield _slope(here, "packed experts: slope", {"y": y}, {"y": total})
        if T in (16, 33):
            yield _gradients(here, experts, p, up, x, routing)


def _slope(at: Situation, quantity: str, tested: dict[str, Tensor], oracle: dict[str, Tensor]) -> Row:
    """How far ⟨tested, oracle⟩ / ⟨oracle, oracle⟩ is from 1."""
    errors = {n: abs(float((tested[n].double() * o).sum() / o.square().sum()) - 1.0) for n, o in oracle.items()}
    worst = max(errors, key=lambda name: errors[name])
    failing = tuple(name for name, error in errors.items() if not error <= SLOPE)
    return Row(at, quantity, worst, errors[worst], SLOPE, 1.0 + errors[worst], failing)


@torch.enable_grad()
def _gradients(
    at: Situation, experts: RecordExperts, p: dict[str, Tensor], up: str, x: Tensor, routing: Routing
) -> Row:
    """Through packed experts to their input and the router's weights, which adapters are trained with."""
    act, ids = experts.layout.activation, routing.expert_ids
    assert act is not None
    found: dict[str, Tensor] = {}
    right: dict[str, Tensor] = {}
    for leaves, dtype, into in ((found, x.dtype, "tested"), (right, torch.float64, "oracle")):
        leaves["x"] = x.detach().to(dtype).requires_grad_()
        leaves["weights"] = routing.weights.detach().to(torch.float32 if into == "tested" else dtype).requires_grad_()
        if into == "tested":
            y = experts(leaves["x"], replace(routing, weights=leaves["weights"]))
        else:
            y = torch.zeros_like(leaves["x"])
            for e in range(E):
                out = expert_output(p, up, e, leaves["x"], act)
                y = y + (leaves["weights"] * (ids == e)).sum(1, keepdim=True) * out
        probe = torch.linspace(-1.0, 1.0, D).to(y.dtype)
        (y * probe).sum().backward()  # type: ignore[no-untyped-call]
    # rows are rounded on the way forward, and what that moves across a kink or along a slope comes back once more
    tolerance = TOLERANCES["bfloat16"] if at.backend != "float32" else tolerance_of("float32", at.dtype)
    grads = ({name: leaf.grad for name, leaf in leaves.items()} for leaves in (found, right))
    return close(at, "packed experts gradients", *grads, tolerance=tolerance)
