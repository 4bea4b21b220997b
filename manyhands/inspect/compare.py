"""Two routings of the same tokens: base and tuned, full and quantised, step 100 and step 1000.

Agreement says something only where expert i of one is expert i of the other: models with one ancestor.

T tokens   E experts   K experts per token
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from manyhands.errors import DataError
from manyhands.inspect.balance import expected_overlap
from manyhands.inspect.observed import Floats, Observed, chosen, overlap
from manyhands.inspect.resample import Figure, Resampler

_MIN_COUNT = 10
_MOST_TOKENS = 12


def check_same(a: Observed, b: Observed, names: tuple[str, str]) -> None:
    """Raises `DataError` unless both hold the same tokens, layers and number of experts."""
    of_a, of_b = names
    for what, ours, theirs in (
        ("sparse layers", list(a.layers), list(b.layers)),
        ("experts", a.num_experts, b.num_experts),
        ("experts per token", a.experts_per_token, b.experts_per_token),
        ("tokens", len(a), len(b)),
    ):
        if ours != theirs:
            raise DataError(f"{of_a} and {of_b} cannot be compared: {what} {ours} and {theirs}")
    different = (a.token_ids != b.token_ids) | (a.sequence != b.sequence)
    if different.any():
        at = int(different.argmax())
        raise DataError(f"{of_a} and {of_b} cannot be compared: token {at} is not the same in both")


def agreement(a: Observed, b: Observed, sampled: Resampler) -> list[dict[str, Any]]:
    """Per layer: the share of a token's experts in `a` that it has in `b` too, beside that of unrelated tokens.

    `load_moved` is half the sum of what experts' shares of all pairs changed by; `by_tag` and `by_domain` are means
    of the agreement; `least` are the token ids that agree least, of those seen ten times or more.
    """
    return [_layer(a, b, layer, sampled) for layer in range(len(a.layers))]


def _layer(a: Observed, b: Observed, layer: int, sampled: Resampler) -> dict[str, Any]:
    ours, theirs, E = a.expert_ids[:, layer], b.expert_ids[:, layer], a.num_experts
    same = overlap(ours, theirs)
    first = np.where(ours[:, 0] >= 0, ours[:, 0] == theirs[:, 0], np.nan).astype(np.float64)
    p, q = (np.bincount(ids[ids >= 0], minlength=E).astype(np.float64) for ids in (ours, theirs))
    ids, compact = np.unique(a.token_ids, return_inverse=True)
    of_id = _means(same, compact, len(ids))
    frequent = np.flatnonzero(np.bincount(compact) >= _MIN_COUNT)
    least = frequent[np.argsort(of_id[frequent], kind="stable")][:_MOST_TOKENS]
    found = {
        "layer": a.layers[layer],
        "experts": sampled.mean([same], expected_overlap(ours, theirs, E)),
        "first_expert": sampled.mean([first], _same_first(ours, theirs, E)),
        "load_moved": float(np.abs(p / max(p.sum(), 1) - q / max(q.sum(), 1)).sum() / 2),
        "least": [{"token_id": int(ids[i]), "agreement": float(of_id[i])} for i in least if ids[i] >= 0],
    }
    if len(a.domains) > 1:
        found["by_domain"] = dict(zip(a.domains, _means(same, a.domain, len(a.domains)).tolist(), strict=True))
    if a.tag is not None:
        tags = np.where(a.tag < 0, len(a.tags), a.tag)
        found["by_tag"] = {
            tag: mean
            for tag, mean in zip(a.tags, _means(same, tags, len(a.tags) + 1)[:-1].tolist(), strict=True)
            if np.isfinite(mean)
        }
    return found


def _means(value_T: Floats, group_T: Any, groups: int) -> Floats:
    real = np.isfinite(value_T)
    count = np.bincount(group_T[real], minlength=groups)
    total = np.bincount(group_T[real], value_T[real], groups)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _same_first(ours: Any, theirs: Any, E: int) -> float:
    a, b = chosen(ours[:, :1], E).mean(0), chosen(theirs[:, :1], E).mean(0)
    return float((a * b).sum() / max(float(a.sum()), 1e-300))


def saturation(runs: Sequence[tuple[str, Observed]], sampled: Resampler) -> list[dict[str, Any]]:
    """OLMoE's router saturation: per checkpoint and layer, the mean of |S_t ∩ S_last| / K over tokens.

    `runs` are named checkpoints of one run on the same tokens, the last one last; its own row is 1.
    """
    last_name, last = runs[-1]
    rows = []
    for name, seen in runs:
        check_same(seen, last, (name, last_name))
        figures: list[Figure] = []
        for layer in range(len(last.layers)):
            ids, final = seen.expert_ids[:, layer], last.expert_ids[:, layer]
            figures.append(sampled.mean([overlap(ids, final)], expected_overlap(ids, final, last.num_experts)))
        rows.append({"checkpoint": name, "layers": figures})
    return rows
