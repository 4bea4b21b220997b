"""Comparing named tensors with the oracle's, and what counts as equal.

float32   the largest error relative to the tensor's largest entry, at most 1e-4. Rounding is 6e-8 per operation and a
          few hundred of them lie on the longest path; a real fault is of the order of 1.
bfloat16  ‖tested − oracle‖ / ‖oracle‖ at most 5e-2, and a cosine of at least 0.99. One rounding to 8 bits is up to
          2⁻⁹ = 0.2 %; independent ones add as a random walk, and weights, activations and gradients are rounded on
          the order of a hundred times on the way forward and back through a few layers: √100 · 0.2 % = 2 %, doubled.
          Entry by entry the relative error is unbounded, because sums cancel, so the norm is what can be held.
integers  equal.

A tensor much smaller than the largest of its kind is measured against a share of that one (`floor`): its rounding
comes from sums of larger numbers. What is exactly zero in the oracle because an expert has no token must be zero.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from manyhands.check.report import Row, Situation


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How near a dtype must come."""

    error: float
    floor: float
    by_norm: bool
    cosine: float
    slack: float
    """The largest difference of router scores that may excuse another choice of experts."""


TOLERANCES = {
    "float32": Tolerance(error=1e-4, floor=1e-3, by_norm=False, cosine=0.9999, slack=1e-4),
    "bfloat16": Tolerance(error=5e-2, floor=2e-2, by_norm=True, cosine=0.99, slack=5e-2),
}

Named = Mapping[str, Tensor | None]


def by_expert(named: Named) -> dict[str, Tensor | None]:
    """Stacked expert tensors taken apart, `….experts.down_proj` -> `….experts.down_proj[e]`; others as they are."""
    apart: dict[str, Tensor | None] = {}
    for name, tensor in named.items():
        if name.rpartition(".")[0].endswith("experts") and tensor is not None:
            apart |= {f"{name}[{e}]": part for e, part in enumerate(tensor)}
        else:
            apart[name] = tensor
    return apart


KINKED = ("relu", "swiglu_oai")


def parts(named: Named, dtype: str, activation: str) -> dict[str, Tensor | None]:
    """Expert by expert, except under an activation with a kink (ReLU, the clamps of gpt-oss) in bfloat16.

    There an input that rounds across the kink takes a whole entry with it, and in an expert of few tokens that is
    much; the stacked tensor stays whole.
    """
    return dict(named) if activation in KINKED and dtype == "bfloat16" else by_expert(named)


def gradient_row(situation: Situation, tested: Named, oracle: Named, activation: str, depth: float = 1.0) -> Row:
    """The row of all gradients. For the same reason a kink in bfloat16 has three times the tolerance.

    `depth` multiplies the tolerance: the square root of how much longer the way is than through a few layers.
    """
    dtype = situation.dtype
    widen = depth * (3.0 if activation in KINKED and dtype == "bfloat16" else 1.0)
    return close(
        situation, "gradients", parts(tested, dtype, activation), parts(oracle, dtype, activation), widen=widen
    )


def largest_norm(dtype: str, named: Named) -> float:
    """The size of the largest tensor, as `close` measures it."""
    return _largest(TOLERANCES[dtype], named)


def _largest(tolerance: Tolerance, named: Named) -> float:
    return max((float(_norm(t, tolerance)) for t in named.values() if t is not None), default=0.0)


def close(
    situation: Situation,
    quantity: str,
    tested: Named,
    oracle: Named,
    *,
    at_least: float = 0.0,
    widen: float = 1.0,
    tolerance: Tolerance | None = None,
) -> Row:
    """One row for real-valued tensors. A tensor that is absent in one and not zero in the other fails.

    `at_least` is the size of the largest tensor of the kind where it may not be among these; `widen` multiplies the
    limit; `tolerance` is that of the dtype unless another is given.
    """
    tolerance = tolerance or TOLERANCES[situation.dtype]
    tolerance = replace(tolerance, error=tolerance.error * widen, cosine=1.0 - (1.0 - tolerance.cosine) * widen)
    largest = max(_largest(tolerance, oracle), at_least)
    worst, worst_error, worst_ratio, failing = "", -1.0, 1.0, []
    for name, o in oracle.items():
        error, ratio = _difference(tested.get(name), o, tolerance, largest, ".experts." in f".{name}")
        if error > worst_error:
            worst, worst_error, worst_ratio = name, error, ratio
        if error > tolerance.error:
            failing.append(name)
    return Row(situation, quantity, worst, max(worst_error, 0.0), tolerance.error, worst_ratio, tuple(failing))


def _difference(
    tested: Tensor | None, oracle: Tensor | None, tolerance: Tolerance, largest: float, strict_zero: bool
) -> tuple[float, float]:
    """Error and norm ratio of one tensor."""
    if oracle is None:
        return (0.0, 1.0) if tested is None or not tested.any() else (float("inf"), float("inf"))
    if tested is None or tested.shape != oracle.shape:
        return float("inf"), 0.0
    t, o = tested.detach().double(), oracle.detach().double()
    if not t.isfinite().all():
        return float("inf"), float("inf")
    if strict_zero and not o.any():
        return (0.0, 1.0) if not t.any() else (float("inf"), float("inf"))
    size = float(o.norm())
    ratio = float(t.norm()) / size if size else float(not t.any())
    scale = max(float(_norm(o, tolerance)), tolerance.floor * largest)
    if scale == 0.0:
        return float(_norm(t, tolerance)), ratio
    error = float(_norm(t - o, tolerance)) / scale
    significant = tolerance.by_norm and size >= tolerance.floor * largest and o.numel() > 1
    if significant and float(torch.dot(t.flatten(), o.flatten())) < tolerance.cosine * float(t.norm()) * size:
        error = max(error, 2.0 * tolerance.error)
    return error, ratio


def _norm(t: Tensor, tolerance: Tolerance) -> Tensor:
    if not t.numel():
        return torch.zeros(())
    return t.detach().double().norm() if tolerance.by_norm else t.detach().double().abs().amax()


def exact(situation: Situation, quantity: str, tested: Mapping[str, Tensor], oracle: Mapping[str, Tensor]) -> Row:
    """One row for integers (or booleans), which must be equal."""
    worst, worst_error, failing = next(iter(oracle), ""), 0.0, []
    for name, o in oracle.items():
        difference = float((tested[name].double() - o.double()).abs().amax()) if o.numel() else 0.0
        if difference > worst_error or difference != difference:
            worst, worst_error = name, difference
        if difference != 0.0:
            failing.append(name)
    expected = float(oracle[worst].double().sum()) if oracle else 0.0
    ratio = float(tested[worst].double().sum()) / expected if expected else 1.0
    return Row(situation, quantity, worst, worst_error, 0.0, ratio, tuple(failing))
