"""What the engine knows of a request beside what the scheduler needs: its random draws, text, cache and routing."""

from collections.abc import Callable
from dataclasses import dataclass, field

from manyhands.engine.adjust import Adjuster
from manyhands.engine.draw import Drawn, TokenLogprob
from manyhands.engine.edited import Edited
from manyhands.engine.prefix import Prefix
from manyhands.engine.request import FinishReason, Request
from manyhands.engine.speculate import Lookup
from manyhands.engine.stream import TextStream
from manyhands.layers.cache import Cache
from manyhands.moe import Routing
from manyhands.moe.edit import Edits


@dataclass(slots=True, eq=False)
class State:
    """One request's: its `kept`."""

    adjuster: Adjuster
    ends: frozenset[int]
    """Tokens that end it, and are not shown."""
    stream: TextStream | None
    prefix: Prefix | None
    keeps_routing: bool
    """That of its passes, here."""
    reads_routing: bool = False
    """What is kept with its blocks, when it ends."""
    cache: Cache | None = None
    """None while nothing is computed."""
    routings: list[dict[int, Routing]] = field(default_factory=list)
    """Of the passes it had a part in, its tokens'."""
    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    stop: str | int | None = None
    """The stop string, or the stop token, that ended it."""
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    """As many as the prompt has tokens, if they are asked for."""
    edited: Edited | None = None
    """What is told to layers of its routing."""
    lookup: Lookup = field(default_factory=Lookup)
    """Its tokens, as far as they were read to guess the next."""

    def resume(self, request: Request, new: Callable[[], Cache]) -> None:
        """Begin with what its prefix shares with it, if anything."""
        assert self.prefix is not None
        cache = self.prefix.begin(request.prompt_ids, new)
        request.num_computed = request.num_cached = len(self.prefix.ids)
        if request.num_computed:
            self.cache = cache

    def begin(self, request: Request, new: Callable[[], Cache]) -> Cache:
        """Its cache: what there is, or `new`, with so many of its tokens as the scheduler found."""
        if self.cache is None:
            self.cache = new()
            cut(self.routings, request.num_computed)
            if self.prefix is not None:
                self.prefix.ids, self.prefix.cache = request.ids(0, request.num_computed), self.cache
        return self.cache

    def edits(self, request: Request, ids: list[int]) -> Edits | None:
        """For the tokens that run next."""
        return None if self.edited is None else self.edited.rows(request.ids(0, request.num_computed), ids)

    def ran(self, ids: list[int], routings: Callable[[], dict[int, Routing]]) -> None:
        """These of its tokens are in the cache."""
        if self.prefix is not None:
            self.prefix.ids += ids
        if self.keeps_routing:
            self.routings.append(routings())

    def reject(self, request: Request) -> None:
        """What ran behind the tokens that count leaves the cache, if the request has not ended."""
        if self.cache is not None:
            self.cache.truncate(request.num_computed)
            request.table.truncate(request.num_computed)

    def forget(self, request: Request) -> None:
        """It has no blocks any more: it was preempted, or a pass was cut short."""
        self.cache = None
        if self.keeps_routing:  # of what it finds in the cache nobody else has it
            request.most_shared = sum(map(count, self.routings))
        if self.prefix is not None:
            self.prefix.clear()

    def leave(self) -> None:
        """It has ended, and its blocks are given back; what a prefix keeps stays with that."""
        if self.prefix is not None and self.cache is not None:
            self.prefix.keep()
        self.cache = None

    def push(self, request: Request, drawn: Drawn) -> tuple[str, FinishReason | None]:
        """It has a new token: the text that became certain with it, and why it ends."""
        token = drawn.token_id
        request.token_ids.append(token)
        if drawn.logprob is not None:
            self.logprobs.append(drawn.logprob)
        text = self.stream.push(token) if self.stream and token not in self.ends else ""
        stopped = token in self.ends or (self.stream is not None and self.stream.stopped)
        if not stopped:
            self.adjuster.push(token)
            stopped = self.adjuster.finished
        if token in request.sampling.stop_token_ids:
            self.stop = token
        elif stopped and self.stream is not None and token not in self.ends:
            self.stop = self.stream.found
        full = request.num_tokens == request.max_length
        reason: FinishReason | None = "stop" if stopped else "length" if full else None
        if reason is not None:
            text += self.stream.finish() if self.stream else ""
        self.text.append(text)
        return text, reason


def state_of(request: Request) -> State:
    """The engine's part of a request that it was given."""
    state = request.kept
    assert isinstance(state, State)
    return state


def count(routings: dict[int, Routing]) -> int:
    """Tokens of a pass."""
    return next((len(routing.expert_ids) for routing in routings.values()), 0)


def cut(passes: list[dict[int, Routing]], length: int) -> None:
    """Forget the routing of all but the first `length` tokens."""
    while passes and sum(map(count, passes)) > length:
        last = passes.pop()
        left = length - sum(map(count, passes))
        if left > 0:
            passes.append({layer: routing.rows(slice(left)) for layer, routing in last.items()})
