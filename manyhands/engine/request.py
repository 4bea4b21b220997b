"""One request: what it asks for, what was made of it, why it ended. Needs no torch.

A request is a sequence of token ids, its prompt and then what was made. The first `num_computed` of them have gone
through the model and lie in the cache. The last one made never has: the next step runs it.
"""

import sys
from dataclasses import dataclass, field
from typing import Literal

from manyhands.config import SamplingConfig
from manyhands.engine.blocks import Table
from manyhands.engine.chain import Chain

FinishReason = Literal["stop", "length", "abort", "error"]
"""stop: a token that ends an answer, a stop string, or a constraint is met. length: `max_new_tokens`, or the context is
full. abort: by the caller. error: what the request's `error` says."""


@dataclass(slots=True, eq=False)
class Request:
    """What one caller asked for, and how far it is. Only the scheduler and the engine write to it."""

    id: int
    prompt_ids: list[int]
    sampling: SamplingConfig
    max_length: int
    """Tokens it may have at most, the prompt included: bounded by `max_new_tokens` and by the model's context."""
    table: Table
    """The blocks of its cache."""
    token_ids: list[int] = field(default_factory=list)
    """What was made so far."""
    num_computed: int = 0
    """Tokens in the cache."""
    finish_reason: FinishReason | None = None
    num_preemptions: int = 0
    """How often its blocks were taken, or a pass was cut short, and it had to be computed again."""
    error: str | None = None
    """What went wrong with it alone."""
    kept: object = field(default=None, repr=False)
    """What the engine keeps with it."""
    salt: str = ""
    """It finds in the cache what requests with the same salt have computed."""
    priority: int = 0
    """Lower is earlier."""
    num_cached: int = 0
    """Tokens of the prompt that were found in the cache when it first ran."""
    most_shared: int = sys.maxsize
    """Tokens that it may take from the cache: of those behind them something is wanted that only a pass makes."""
    rank: tuple[int, int] = (0, 0)
    """Its place among all requests, the first smallest. The scheduler's."""
    _chain: Chain | None = field(default=None, repr=False)

    @property
    def num_tokens(self) -> int:
        """Prompt and what was made."""
        return len(self.prompt_ids) + len(self.token_ids)

    @property
    def num_waiting(self) -> int:
        """Tokens that have not gone through the model; 1 while decoding."""
        return self.num_tokens - self.num_computed

    @property
    def most_cached(self) -> int:
        """Positions of cache it can come to need: all but the last made token's."""
        return max(self.num_tokens, self.max_length - 1)

    @property
    def scores_prompt(self) -> bool:
        """Whether logits of every token of the prompt are asked for: it runs in small chunks, and from the start."""
        return self.sampling.prompt_logprobs is not None

    def next_ids(self, count: int) -> list[int]:
        """The `count` tokens that run next."""
        return self.ids(self.num_computed, count)

    def ids(self, first: int, count: int) -> list[int]:
        """Its tokens from the `first` on."""
        prompt = len(self.prompt_ids)
        if first >= prompt:
            return self.token_ids[first - prompt : first - prompt + count]
        return (self.prompt_ids[first : first + count] + self.token_ids[: max(0, first + count - prompt)])[:count]

    def keys(self, epoch: int = 0) -> list[bytes]:
        """By what its full blocks are found. Not for what another epoch's passes left: see `Scheduler.epoch`."""
        if self._chain is None or (self._chain.epoch != epoch and not self.num_computed):
            self._chain = Chain(self.salt, epoch)
        size, chain = self.table.block_size, self._chain
        for i in range(len(chain.keys), self.num_tokens // size):
            chain.follow(self.ids(i * size, size))
        return chain.keys
