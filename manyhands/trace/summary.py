"""A trace at a glance: how many tokens, in which passes, and how they were spread over the experts.

T tokens   L sparse layers   K experts per token   E experts
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from manyhands.trace.part import Phase
from manyhands.trace.recording import Trace


@dataclass(frozen=True, slots=True)
class Layer:
    """One sparse layer."""

    layer: int
    load_max_over_mean: float
    """Pairs of the busiest expert over the mean; NaN without pairs."""
    dead: int
    """Experts that no token chose."""
    distinct_per_step: float
    """Experts that a forward pass needs, on average."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What `manyhands trace show` prints."""

    tokens: int
    phases: dict[str, int]
    """Tokens of each phase that there is, by its name."""
    sequences: int
    steps: int
    tokens_per_step: float
    known_tokens: int
    """Tokens whose id was recorded."""
    bytes: int
    """Of all arrays."""
    layers: list[Layer]

    def as_dict(self) -> dict[str, Any]:
        """For JSON; NaN is None."""
        layers = [
            {
                "layer": one.layer,
                "load_max_over_mean": None if np.isnan(one.load_max_over_mean) else one.load_max_over_mean,
                "dead": one.dead,
                "distinct_per_step": one.distinct_per_step,
            }
            for one in self.layers
        ]
        return {name: getattr(self, name) for name in self.__slots__} | {"layers": layers}


def summary(trace: Trace) -> Summary:
    """Reads the trace once, part by part. Raises `DataError` as `Trace.parts` does."""
    manifest = trace.manifest
    L, E = len(manifest.layers), manifest.num_experts
    counts_LE, distinct_L = np.zeros((L, E), np.int64), np.zeros(L, np.int64)
    phases, sequences = np.zeros(1 + max(Phase), np.int64), set[int]()
    tokens = steps = known = 0
    for part in trace.whole():
        tokens += len(part)
        known += int((part.token_ids >= 0).sum())
        phases += np.bincount(part.phase, minlength=len(phases))
        sequences.update(np.unique(part.sequence).tolist())
        step_T = np.cumsum(np.diff(part.step, prepend=part.step[:1]) > 0)
        steps += int(step_T[-1]) + 1
        for at in range(L):
            ids_TK = part.expert_ids[:, at].astype(np.int64)
            counts_LE[at] += np.bincount(ids_TK.ravel(), minlength=E)[:E]
            distinct_L[at] += len(np.unique((step_T[:, None] * E + ids_TK)[ids_TK < E]))
    return Summary(
        tokens=tokens,
        phases={phase.name.lower(): int(phases[phase]) for phase in Phase if phases[phase]},
        sequences=len(sequences),
        steps=steps,
        tokens_per_step=tokens / max(steps, 1),
        known_tokens=known,
        bytes=tokens * manifest.token_bytes(),
        layers=[
            Layer(
                layer=layer,
                load_max_over_mean=float(counts.max() / counts.mean()) if counts.any() else float("nan"),
                dead=int((counts == 0).sum()),
                distinct_per_step=float(distinct / max(steps, 1)),
            )
            for layer, counts, distinct in zip(manifest.layers, counts_LE, distinct_L, strict=True)
        ],
    )
