"""What a request changes in its logits before a token is drawn: bias, penalties, tokens that may not come.

n tokens so far, V vocabulary. In this order: bias, repetition, presence and frequency, the caller's own processors,
then what is forbidden.
"""

import math
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from manyhands.config import SamplingConfig
from manyhands.engine.constraint import Constraint
from manyhands.errors import UserError

LogitsProcessor = Callable[[Tensor, Tensor], Tensor]
"""As transformers has them: `(input_ids [1, n] int64, scores [1, V] float32) -> scores [1, V]`."""


class Adjuster:
    """One request's: it remembers which tokens there were."""

    def __init__(
        self,
        sampling: SamplingConfig,
        prompt: Sequence[int],
        ends: Collection[int],
        constraint: Constraint | None,
        processors: Sequence[LogitsProcessor] = (),
    ) -> None:
        self._sampling, self._constraint, self._processors = sampling, constraint, processors
        self._ids = [*prompt] if processors else []
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
            or processors
        )
        """Whether it ever changes anything."""

    @property
    def finished(self) -> bool:
        """Whether the constraint is met and nothing may follow."""
        return self._constraint is not None and self._constraint.finished

    def push(self, token: int) -> None:
        """The request has one more token."""
        self._made += 1
        if self._processors:
            self._ids.append(token)
        if self._seen is not None:
            self._seen.add(token)
        if self._counts is not None:
            self._counts[token] = self._counts.get(token, 0) + 1
        if self._constraint is not None:
            self._constraint.accept(token)

    def apply(self, logits_V: Tensor) -> Tensor:
        """Another [V] float32. Raises `UserError` for a processor that gives something else."""
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
        if self._processors:
            logits = self._processed(logits)
        if self._ends and self._made < sampling.min_new_tokens:
            logits[[token for token in self._ends if token < V]] = -math.inf
        allowed = None if self._constraint is None else self._constraint.allowed()
        if allowed is not None:
            room = torch.zeros(V, dtype=torch.bool)
            room[: len(allowed)] = allowed[:V]
            logits.masked_fill_(~room.to(logits.device), -math.inf)
        return logits

    def _processed(self, logits_V: Tensor) -> Tensor:
        ids_1N = torch.tensor([self._ids], dtype=torch.int64, device=logits_V.device)
        scores_1V = logits_V[None]
        for processor in self._processors:
            given = processor(ids_1N, scores_1V)
            if not isinstance(given, Tensor) or given.shape != scores_1V.shape:
                what = list(given.shape) if isinstance(given, Tensor) else type(given).__name__
                raise UserError(f"a logits processor gave {what} for scores {list(scores_1V.shape)}")
            scores_1V = given.float()
        return scores_1V[0].clone()
