"""Which experts a text needs (ESFT, arXiv 2407.01906, section 3): their relevance, and the fewest that make most of it.

E experts.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from manyhands.errors import DataError
from manyhands.trace.counts import expert_counts
from manyhands.trace.recording import Trace

By = Literal["token", "gate"]
THRESHOLDS: Mapping[By, float] = {"token": 0.2, "gate": 0.1}
"""p of the paper's experiments."""


def relevance(trace: Trace, by: By) -> dict[int, npt.NDArray[np.float64]]:
    """Layer -> [E], which add up to 1: an expert's share of the tokens' choices, or of the sum of their weights.

    Raises `DataError` as `parts` does, where no token was recorded, and for `gate` without recorded weights.
    """
    manifest = trace.manifest
    if by == "token":
        sums_LE = expert_counts(trace).astype(np.float64)
    elif "weights" not in manifest.recorded:
        raise DataError(f"{trace.path}: has no weights, which relevance by gate is measured by: take token")
    else:
        sums_LE = np.zeros((len(manifest.layers), manifest.num_experts))
        for part in trace.parts():
            assert part.weights is not None
            for layer in range(len(manifest.layers)):
                ids, weights = part.expert_ids[:, layer].ravel(), part.weights[:, layer].ravel()
                there = (ids >= 0) & (ids < manifest.num_experts)
                sums_LE[layer] += np.bincount(ids[there], weights[there].astype(np.float64), manifest.num_experts)
    every = zip(manifest.layers, sums_LE, strict=True)
    return {layer: shares(sums_E, f"{trace.path}: layer {layer}") for layer, sums_E in every}


def shares(sums_E: npt.ArrayLike, where: str) -> npt.NDArray[np.float64]:
    """[E]: what each is of the whole. Raises `DataError` naming `where` if there is nothing."""
    found = np.asarray(sums_E, np.float64)
    total = found.sum()
    if not (np.isfinite(total) and total > 0):
        raise DataError(f"{where}: no token chose any expert")
    return np.asarray(found / total)


def most_relevant(relevance_E: Sequence[float] | npt.NDArray[np.float64], threshold: float) -> tuple[int, ...]:
    """The fewest experts whose relevance adds up to `threshold`, ascending; of equal ones the lower number."""
    found = np.asarray(relevance_E, np.float64)
    order = np.argsort(-found, kind="stable")
    reached = np.cumsum(found[order])
    count = int(np.searchsorted(reached, threshold * (1 - 1e-12))) + 1  # sums of shares end a rounding below 1
    return tuple(sorted(int(e) for e in order[: min(count, len(found))]))
