"""What a request changes in its logits before a token is drawn: bias, penalties, tokens that may not come.

V vocabulary. In this order: bias, repetition, presence and frequency, then what is forbidden.
"""

import math
from collections.abc import Collection

import torch
from torch import Tensor

from manyhands.config import SamplingConfig
from manyhands.engine.constraint import Constraint


class Adjuster:
    """One request's: it remembers which tokens there were."""

    def __init__(
        self, sampling: SamplingConfig, prompt: Collection[int], ends: Collection[int], constraint: Constraint | None
    ) -> None:
        self._sampling, self._constraint = sampling, constraint
        self._ends = sorted(ends) if sampling.min_new_tokens else []
        self._seen = set(prompt) if sampling.repetition_penalty != 1.0 else None
        self._counts: dict[int, int] | None = {} if sampling.presence_penalty or sampling.frequency_penalty else None
        self._made = 0
        self.needed = bool(
            sampling.logit_bias
            or self._ends
            or self._seen is not None
            or self._counts is not None
            or constraint is not None
        )
        """Whether it ever changes anything."""

    @property
    def finished(self) -> bool:
        """Whether the constraint is met and nothing may follow."""
        return self._constraint is not None and self._constraint.finished

    def push(self, token: int) -> None:
        """The request has one more token."""
        self._made += 1
        if self._seen is not None:
            self._seen.add(token)
        if self._counts is not None:
            self._counts[token] = self._counts.get(token, 0) + 1
        if self._constraint is not None:
            self._constraint.accept(token)

    def apply(self, logits_V: Tensor) -> Tensor:
        """Another [V] float32."""
        sampling, logits = self._sampling, logits_V.float().clone()
        V = logits.shape[0]
        if sampling.logit_bias:
            pairs = [(token, bias) for token, bias in sampling.logit_bias if token < V]
            ids = torch.tensor([token for token, _ in pairs], dtype=torch.int64, device=logits.device)
            logits.index_add_(0, ids, torch.tensor([bias for _, bias in pairs], device=logits.device))
        if self._seen:
            ids = torch.tensor(sorted(self._seen), device=logits.device)
            found, penalty = logits[ids], sampling.repetition_penalty
            logits[ids] = torch.where(found > 0, found / penalty, found * penalty)
        if self._counts:
            ids = torch.tensor(list(self._counts), device=logits.device)
            counts = torch.tensor(list(self._counts.values()), device=logits.device)
            logits[ids] -= sampling.frequency_penalty * counts + sampling.presence_penalty
        if self._ends and self._made < sampling.min_new_tokens:
            logits[[token for token in self._ends if token < V]] = -math.inf
        allowed = None if self._constraint is None else self._constraint.allowed()
        if allowed is not None:
            room = torch.zeros(V, dtype=torch.bool)
            room[: len(allowed)] = allowed[:V]
            logits.masked_fill_(~room.to(logits.device), -math.inf)
        return logits
