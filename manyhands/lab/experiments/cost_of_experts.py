"""Time of one MoE layer, forward and backward, at a fixed width and a fixed number of experts per token.

T tokens, D model width, E experts, K experts per token, F expert width.
"""

import torch

from manyhands.config import MoEConfig, RouterConfig
from manyhands.lab.experiment import Arm, Chart, Criterion, Curve, Figure, Outcome
from manyhands.lab.job import Job
from manyhands.moe import MoELayer

K = 2
_ROWS = 64
"""Rows per expert from which the larger factor is accepted."""


def run(job: Job) -> Outcome:
    """Layers of growing E, taking turns."""
    T, D, F = (256, 32, 32) if job.quick else (8192, 256, 256)
    counts = (2, 8, 32) if job.quick else (2, 8, 32, 64, 128, 256, 512)
    rounds = 2 if job.quick else 12
    torch.manual_seed(job.seeds[0])
    layers = {E: _layer(E, D, F) for E in counts}
    x_TD = torch.randn(T, D)
    best = dict.fromkeys(counts, float("inf"))
    rows: dict[int, float] = {}
    for turn in range(rounds + 1):
        job.note(f"round {turn} of {rounds}")
        for E, layer in layers.items():
            layer.zero_grad(set_to_none=True)
            with job.clock() as clock:
                y_TD, routing = layer(x_TD)
                y_TD.square().mean().backward()  # type: ignore[no-untyped-call]
            rows[E] = routing.expert_ids.numel() / E
            if turn:  # the first warms up
                best[E] = min(best[E], clock.seconds)
    first = best[counts[0]]
    ratio = {E: seconds / first for E, seconds in best.items()}
    arms = tuple(_arm(E, layer, D, F) for E, layer in layers.items())
    few = max(ratio[E] for E in counts if E <= 64)
    many = max(ratio[E] for E in counts if rows[E] >= _ROWS)
    judged = job.quiet and not job.quick
    criteria = [
        Criterion(
            "every layer multiplies a token by the same number of expert weights",
            f"{arms[0].active} to {arms[-1].active} parameters with the router's, while the layer holds "
            f"{arms[-1].parameters / arms[0].parameters:.1f} times as many",  # type: ignore[operator]
            len({(arm.active or 0) - E * D for arm, E in zip(arms, counts, strict=True)}) == 1,
        )
    ]
    if not job.quick:
        criteria += [
            Criterion("at most 1.1 times the time up to 64 experts", f"{few:.2f}", few <= 1.1 if judged else None),
            Criterion(
                f"at most 1.3 times while each expert has {_ROWS} rows or more",
                f"{many:.2f}",
                many <= 1.3 if judged else None,
            ),
        ]
    figures = tuple(
        figure
        for E in counts
        for figure in (
            Figure("time", f"E {E}", (1e3 * best[E],), "ms", 2),
            Figure(f"time, as a multiple of E {counts[0]}'s", f"E {E}", (ratio[E],), digits=2),
        )
    )
    chart = Chart(
        "Time against the number of experts",
        "log₂ of the number of experts",
        f"times E {counts[0]}'s",
        (Curve("one layer", [float(E.bit_length() - 1) for E in counts], [ratio[E] for E in counts]),),
        "Forward and backward, best of several rounds in which the layers take turns.",
        y_from_zero=True,
    )
    return Outcome(arms, figures, tuple(criteria), (chart,))


def _layer(E: int, D: int, F: int) -> MoELayer:
    return MoELayer(MoEConfig(router=RouterConfig(num_experts=E, num_experts_per_tok=K), moe_intermediate_size=F), D)


def _arm(E: int, layer: MoELayer, D: int, F: int) -> Arm:
    """A SwiGLU expert is three matrices of D·F."""
    total = sum(p.numel() for p in layer.parameters())
    active = total - (E - K) * 3 * D * F
    return Arm(f"E {E}", total, active, 2.0 * active)
