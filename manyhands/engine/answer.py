"""What comes out of the engine: tokens as they are made, and all of them in the end."""

from dataclasses import dataclass, field

from manyhands.engine.draw import TokenLogprob
from manyhands.engine.request import FinishReason, Request
from manyhands.engine.runner import Routed
from manyhands.moe import Routing
from manyhands.store.store import Reads


@dataclass(frozen=True, slots=True)
class Token:
    """One new token of one request."""

    request: Request
    token_id: int
    text: str
    """What became certain with this token, never half a character. Empty without a tokenizer."""
    finish_reason: FinishReason | None
    """Why the request ended with it, or None."""
    said: TokenLogprob | None
    """If `logprobs` were asked for."""
    _routed: Routed = field(repr=False)
    _at: int = field(repr=False)

    @property
    def logprob(self) -> float | None:
        """Of this token, by the model alone; None if it was not asked for."""
        return None if self.said is None else self.said.logprob

    @property
    def top_logprobs(self) -> tuple[tuple[int, float], ...]:
        """The most probable tokens, best first."""
        return () if self.said is None else self.said.top

    @property
    def routings(self) -> dict[int, Routing]:
        """Per sparse layer, T = 1: the routing of the forward pass the token was drawn from."""
        return self._routed.rows(slice(self._at, self._at + 1))


@dataclass(frozen=True, slots=True)
class Completion:
    """What one prompt was continued with."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    """None: it has not ended yet."""
    routings: dict[int, Routing] = field(default_factory=dict)
    """If it was asked for, per sparse layer: of every token that ran for it, the prompt's and then all new ones but
    the last."""
    stop_reason: str | int | None = None
    """The stop string or the token of `stop_token_ids` that ended it; None for another end."""
    logprobs: list[TokenLogprob] | None = None
    """Of the new tokens, if they were asked for."""
    prompt_logprobs: list[TokenLogprob | None] | None = None
    """Of the prompt's tokens, if they were asked for; None for the first, and for what has not run yet."""


@dataclass(frozen=True, slots=True)
class Ran:
    """One forward pass: who took part, and who went where."""

    routed: Routed
    """Of all tokens of the pass."""
    requests: list[Request]
    starts: list[int]
    """Of each request, the first of its tokens in the pass."""
    reads: Reads | None = None
    """What of the experts was read from disk; None: they are in memory."""
