"""How often each expert was chosen: what pinning, pruning, ESFT and placement start from."""

import numpy as np
import numpy.typing as npt

from manyhands.trace.recording import Trace


def expert_counts(trace: Trace) -> npt.NDArray[np.int64]:
    """[L, E]: tokens that chose each expert, per sparse layer in the order of `manifest.layers`.

    Pairs that a capacity left out are counted: they show what the router wanted. Raises `DataError` as `parts` does.
    """
    L, E = len(trace.manifest.layers), trace.manifest.num_experts
    counts = np.zeros((L, E), np.int64)
    for part in trace.parts():
        for layer in range(L):
            counts[layer] += np.bincount(part.expert_ids[:, layer].ravel(), minlength=E)[:E]  # no expert is behind E
    return counts
