"""How large a model, on how many tokens, for C FLOPs: the joint scaling law of dense and MoE models.

L(N, D, E) = a·Ê^δ·N^(α + γ·ln Ê) + b·Ê^ω·D^(β + ζ·ln Ê) + c        (arXiv 2502.05172, equation and table of its fit)

N active parameters, D training tokens, E experts of which one works for a token, each as large as a dense feed-forward
network (granularity 1); Ê is E, bent so that one expert is worth E₀ and endless ones E_max.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import exp, log

A, ALPHA, DELTA, GAMMA = 35.91, -0.1889, -0.2285, 0.0098
B, BETA, OMEGA, ZETA = 35.98, -0.1775, 0.5529, -0.0259
C, E_START, E_MAX = 1.3637, 2.0732, 290.4521
EXPERTS = (1, 2, 4, 8, 16, 32)
"""Fitted on 1 to 32 experts; the law is not to be used beyond."""
ACTIVE_RANGE = (0.0, 2.7e9)
TOTAL_RANGE = (0.0, 5e9)
"""The largest of its more than 280 models: 2.7 B active, 5 B in total (abstract)."""
FEED_FORWARD = 2 / 3
BAND = 0.005
"""A size is inside the ± band if its loss is at most this share above the best one's."""


def effective_experts(experts: float) -> float:
    """Ê: 1/Ê = 1 / (E - 1 + (1/E₀ - 1/E_max)⁻¹) + 1/E_max."""
    start = 1 / (1 / E_START - 1 / E_MAX)
    return 1 / (1 / (experts - 1 + start) + 1 / E_MAX)


def loss(active: float, tokens: float, experts: float) -> float:
    """Cross entropy per token, in nats, on that paper's data: compare it with itself only."""
    e = effective_experts(experts)
    n_term = A * e**DELTA * active ** (ALPHA + GAMMA * log(e))
    return float(n_term + B * e**OMEGA * tokens ** (BETA + ZETA * log(e)) + C)


@dataclass(frozen=True, slots=True)
class Optimum:
    """The best split of a budget, and the sizes that are nearly as good."""

    flops: float
    experts: int
    active: float
    tokens: float
    loss: float
    smallest: float
    largest: float
    """Active parameters between which the loss is within `BAND` of the best."""

    @property
    def extrapolated(self) -> bool:
        """Whether a size, active or total, lies beyond what the law was fitted on."""
        return self.active > ACTIVE_RANGE[1] or self.total > TOTAL_RANGE[1]

    @property
    def total(self) -> float:
        """Parameters in total, about: two thirds of a layer (8·D² of 12·D²) are its feed-forward network, E times."""
        return self.active * (1 + FEED_FORWARD * (self.experts - 1))


def best_split(flops: float, experts: int) -> Optimum:
    """Minimise L over N with 6·N·D = C (arXiv 2001.08361 §2.1); `flops` is C."""

    def at(log_n: float) -> float:
        n = exp(log_n)
        return loss(n, flops / (6 * n), experts)

    low, high = log(1e4), log(flops / 6 / 1e4)
    best = _minimum(at, low, high)
    limit = at(best) * (1 + BAND)
    smallest = _crossing(at, low, best, limit)
    largest = _crossing(at, high, best, limit)
    n = exp(best)
    return Optimum(flops, experts, n, flops / (6 * n), at(best), exp(smallest), exp(largest))


def _minimum(f: Callable[[float], float], low: float, high: float) -> float:
    """Of a function with one valley, by thirds."""
    for _ in range(200):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        if f(left) < f(right):
            high = right
        else:
            low = left
    return (low + high) / 2


def _crossing(f: Callable[[float], float], outside: float, inside: float, limit: float) -> float:
    """Where `f` rises above `limit` between a point above it and one below it."""
    for _ in range(100):
        middle = (outside + inside) / 2
        if f(middle) > limit:
            outside = middle
        else:
            inside = middle
    return inside
