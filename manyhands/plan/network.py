"""What talking between devices takes: α + β·bytes for one collective (Hockney, Parallel Computing 20(3), 1994).

α is the time of a collective that moves next to nothing, 1/β the bytes per second of the busiest device. Two figures,
measured at a few sizes (`benchmarks/scale.py`) or read off a data sheet.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from manyhands.config import Strict
from manyhands.plan.machine import Positive


class Network(Strict):
    """α and 1/β, and what they are of."""

    format: Literal["manyhands network"] = "manyhands network"
    latency: Annotated[float, Field(ge=0.0, lt=1e6)]
    """α, seconds of a collective."""
    bandwidth: Positive
    """1/β, bytes per second."""
    duplex: bool = True
    """Whether a device sends and gets at this rate at once. Not so where a processor copies both, as on loopback: then
    the mean of what it sends and gets counts, and not the larger."""
    ranks: Annotated[int, Field(strict=True, ge=2)] | None = None
    """How many took part when it was measured; another number has another α."""
    source: Annotated[str, Field(max_length=1000)] = ""
    """Who measured it, and where."""

    def seconds(self, bytes: float, collectives: float = 1) -> float:
        """Of `collectives` in turn that move `bytes` in all, counted at the busiest device in each: those of its busier
        direction, or the mean of both (`duplex`)."""
        return collectives * self.latency + bytes / self.bandwidth


def fitted(samples: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(α, 1/β) of at least two sizes in (bytes, seconds): least squares of the relative errors, α not below 0.

    Relative, because a fit of seconds would hear the largest size only. Raises `ValueError` where seconds do not grow.
    """
    weighted = [(1 / seconds, size / seconds) for size, seconds in samples]  # α·u + β·v = 1
    uu = sum(u * u for u, _ in weighted)
    uv = sum(u * v for u, v in weighted)
    vv = sum(v * v for _, v in weighted)
    u1, v1 = sum(u for u, _ in weighted), sum(v for _, v in weighted)
    apart = uu * vv - uv * uv
    if apart <= 1e-12 * uu * vv:
        raise ValueError(f"{len(samples)} samples of one size say nothing about bytes per second")
    alpha, beta = (u1 * vv - v1 * uv) / apart, (v1 * uu - u1 * uv) / apart
    if alpha < 0:
        alpha, beta = 0.0, v1 / vv
    if beta <= 0:
        raise ValueError("more bytes did not take longer: measure larger sizes")
    return alpha, 1 / beta
