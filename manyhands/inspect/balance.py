"""Load, co-activation, overlap in time: what can be said of routing without knowing what the tokens are.

T tokens   E experts   K experts per token
"""

import math
from typing import Any

import numpy as np

from manyhands.inspect.observed import Floats, Observed, chosen, overlap
from manyhands.inspect.resample import Figure, Resampler

LAGS = tuple(range(1, 9))
_MOST_PAIRS = 8


def load(seen: Observed, layer: int) -> dict[str, Any]:
    """Of one layer: each expert's share of the pairs, and how uneven that is.

    MaxVio 0, CV² 0, Gini 0 and entropy 1 are perfect balance; a dead expert took no token at all.
    """
    E = seen.num_experts
    ids = seen.expert_ids[:, layer]
    counts_E = np.bincount(ids[ids >= 0], minlength=E).astype(np.float64)
    share_E = counts_E / max(counts_E.sum(), 1)
    real = share_E[share_E > 0]
    ranks = np.arange(1, E + 1)
    return {
        "share": share_E,
        "max_vio": float(share_E.max() * E - 1),
        "cv_squared": float(share_E.var() / share_E.mean() ** 2) if counts_E.sum() else math.nan,
        "gini": float(2 * (ranks * np.sort(share_E)).sum() / E - (E + 1) / E),
        "entropy": float(-(real * np.log(real)).sum() / math.log(E)) if E > 1 else 1.0,
        "dead": np.flatnonzero(counts_E == 0).tolist(),
    }


def coactivation(seen: Observed, layer: int, seed: int = 0) -> dict[str, Any]:
    """Which experts serve the same tokens: N_ij / N_i over all pairs of a token's experts (OLMoE's definition).

    `lift` [E, E] divides by what independent choices of the same loads give, (K − 1) · share_j among the others;
    `strongest` are the pairs with the largest lift whose count is at least 30; `mean_abs_log2_lift`, weighed by the
    counts expected, says how far all pairs are from independent, and its null deals each choice to other tokens.
    """
    ids = seen.expert_ids[:, layer]
    counts_EE, expected_EE = _pairs(ids, seen.num_experts)
    rng = np.random.default_rng(seed)
    null = _pairs(np.stack([rng.permutation(column) for column in ids.T], axis=1), seen.num_experts)
    with np.errstate(divide="ignore", invalid="ignore"):
        lift_EE = np.where(expected_EE > 0, counts_EE / expected_EE, np.nan)
    upper = np.triu(np.where(counts_EE >= 30, np.nan_to_num(lift_EE), 0), 1)
    best = np.argsort(-upper, axis=None, kind="stable")[:_MOST_PAIRS]
    pairs = [(int(i), int(j)) for i, j in zip(*np.unravel_index(best, upper.shape), strict=True) if upper[i, j] > 1]
    return {
        "lift": lift_EE,
        "strongest": [
            {"experts": [i, j], "tokens": int(counts_EE[i, j]), "lift": float(lift_EE[i, j])} for i, j in pairs
        ],
        "mean_abs_log2_lift": _distance(counts_EE, expected_EE),
        "mean_abs_log2_lift_shuffled": _distance(*null),
    }


def _pairs(ids_TK: Any, num_experts: int) -> tuple[Floats, Floats]:
    """[E, E] tokens that went to both of two experts, and as many as independent choices of these loads would give.

    Two different experts i and j of a token of K, drawn without replacement in proportion to the loads p: about
    p_i p_j (1 / (1 − p_i) + 1 / (1 − p_j)), scaled so that the table has the same sum.
    """
    on_TE = chosen(ids_TK, num_experts).astype(np.float32)
    counts = (on_TE.T @ on_TE).astype(np.float64)
    np.fill_diagonal(counts, 0)
    load_E = on_TE.sum(0, dtype=np.float64)
    p = np.clip(load_E / max(load_E.sum(), 1), 0, 1 - 1e-9)
    expected = np.outer(p, p) * (1 / (1 - p)[:, None] + 1 / (1 - p)[None, :])
    np.fill_diagonal(expected, 0)
    return counts, expected * counts.sum() / max(expected.sum(), 1e-300)


def _distance(counts_EE: Floats, expected_EE: Floats) -> float:
    real = expected_EE >= 5
    if not real.any():
        return math.nan
    ratio = np.log2(np.maximum(counts_EE[real], 0.5) / expected_EE[real])
    return float((np.abs(ratio) * expected_EE[real]).sum() / expected_EE[real].sum())


def over_time(seen: Observed, layer: int, sampled: Resampler) -> dict[int, Figure]:
    """By lag: the share of a token's experts that the token `lag` before it, in the same sequence, had too.

    The null is what two unrelated tokens share: Σ_e P(e)² / K. A random router's is high too: neighbours are alike.
    """
    null = expected_overlap(seen.expert_ids[:, layer], seen.expert_ids[:, layer], seen.num_experts)
    return {
        lag: sampled.mean([_lagged(ids, seen, lag) for ids in seen.variants(layer)], null)
        for lag in LAGS
        if lag < len(seen)
    }


def _lagged(ids_TK: Any, seen: Observed, lag: int) -> Floats:
    """[T]; NaN for a token without one so far before it."""
    out = np.full(len(seen), np.nan)
    same = seen.sequence[lag:] == seen.sequence[:-lag]
    out[lag:] = np.where(same, overlap(ids_TK[lag:], ids_TK[:-lag]), np.nan)
    return out


def expected_overlap(a_TK: Any, b_TK: Any, num_experts: int) -> float:
    """Of a token's experts in `a`, the share that those of another token in `b` hold, on average."""
    a, b = chosen(a_TK, num_experts).mean(0), chosen(b_TK, num_experts).mean(0)
    return float((a * b).sum() / a.sum()) if a.sum() else math.nan
