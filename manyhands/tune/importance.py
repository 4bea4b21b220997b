"""What an expert is worth, from tokens that a model ran or from a recorded trace.

REAP (Lasby et al. 2025, arXiv 2510.13999): S_j is the mean, over the tokens that chose expert j, of g_j·‖f_j(x)‖, with
g the weights of a token's experts divided by their sum, and without the bias that selection adds (`Routing.weights`
never has it). With one expert per token g is its weight as it is: divided by itself it would say nothing.

T tokens, E experts, K experts per token, D model width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from manyhands.errors import DataError, UserError
from manyhands.moe import Routing
from manyhands.trace.counts import expert_counts
from manyhands.trace.recording import Trace

By = Literal["reap", "frequency", "gate", "random"]
"""`reap` as above; `frequency`: how many tokens chose it; `gate`: the sum of its g; `random`: a control."""


@dataclass(slots=True)
class Seen:
    """Sums over the tokens of one layer, float64 [E]."""

    tokens: Tensor
    gate: Tensor
    """Σ g."""
    activation: Tensor
    """Σ g·‖f‖."""

    @classmethod
    def nothing(cls, num_experts: int) -> "Seen":
        """Before the first token."""
        return cls(*(torch.zeros(num_experts, dtype=torch.float64) for _ in range(3)))

    def add(self, routing: Routing) -> None:
        """Tokens that were run with `keep_outputs`. What a capacity left out is not counted."""
        assert routing.expert_outputs is not None
        kept_TK = routing.kept & routing.token_mask[:, None] & (routing.expert_ids >= 0)
        g_TK = renormalised(routing.weights.double().where(kept_TK, 0.0))
        norm_TK = routing.expert_outputs.double().norm(dim=-1)
        ids = routing.expert_ids.clamp(min=0).flatten()
        for total, each in ((self.tokens, kept_TK.double()), (self.gate, g_TK), (self.activation, g_TK * norm_TK)):
            total.index_add_(0, ids, each.where(kept_TK, 0.0).flatten())

    def score(self, by: By) -> Tensor:
        """[E] float64: the higher, the more it is worth. An expert that no token chose is worth nothing."""
        return {"frequency": self.tokens, "gate": self.gate, "reap": self.activation / self.tokens.clamp(min=1)}[by]


def renormalised(weights_TK: Tensor) -> Tensor:
    """Divided by their sum; with one expert per token as they are."""
    if weights_TK.shape[-1] == 1:
        return weights_TK
    return weights_TK / weights_TK.sum(-1, keepdim=True).clamp(min=1e-20)


def random_score(num_experts: int, seed: int, layer: int) -> Tensor:
    """[E]: the control."""
    state = np.random.SeedSequence((seed, layer)).generate_state(num_experts, np.uint64)
    return torch.from_numpy((state >> np.uint64(11)).astype(np.float64))


def traced(trace: Trace, by: By, layers: list[int], num_experts: int) -> Mapping[int, Tensor]:
    """[E] per sparse layer, by `frequency` or `gate`, from what was recorded.

    Raises `UserError` for another measure, `DataError` for a trace of another shape, of no token or without weights.
    """
    m = trace.manifest
    if by == "reap":
        raise UserError("--by reap needs what experts say, which no trace has: give --data, or --by frequency or gate")
    if list(m.layers) != layers or m.num_experts != num_experts:
        raise DataError(
            f"{trace.path}: {len(m.layers)} layers of {m.num_experts} experts; the model has {len(layers)} of "
            f"{num_experts}: a trace of another model"
        )
    if not len(trace):
        raise DataError(f"{trace.path}: no token was recorded")
    if by == "frequency":
        return {layer: torch.from_numpy(row).double() for layer, row in zip(layers, expert_counts(trace), strict=True)}
    if "weights" not in m.recorded:
        raise DataError(f"{trace.path}: no weights were recorded, which --by gate sums: give --by frequency, or --data")
    gate_LE = np.zeros((len(layers), num_experts))
    for part in trace.parts():
        assert part.weights is not None
        kept_TLK = part.expert_ids < num_experts
        g_TLK = renormalised(torch.from_numpy(part.weights.astype(np.float64) * kept_TLK)).numpy()
        for row in range(len(layers)):
            ids = part.expert_ids[:, row].ravel()[kept_TLK[:, row].ravel()]
            gate_LE[row] += np.bincount(ids, g_TLK[:, row].ravel()[kept_TLK[:, row].ravel()], minlength=num_experts)
    return {layer: torch.from_numpy(row) for layer, row in zip(layers, gate_LE, strict=True)}
