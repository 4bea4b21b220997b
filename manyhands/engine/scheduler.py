"""Who runs in the next step, and how many tokens of each. Needs no torch.

A step runs at most `max_batch_tokens` tokens of at most `max_sequences` requests:

1. one token of each running request that is decoding;
2. of running requests with more to run, as much as the step has room for (their prompts, in chunks);
3. waiting requests, as long as there are blocks for all they have so far. What of it the cache holds is not run again,
   and who needs a block that a running request is about to compute waits for that.

First come first served, but for the requests' priority: each level is as if the request had come `AGEING` steps later,
so that whoever waits is overtaken only by those that come soon after.

When a decoding request needs a block and none is free, the last of the running requests gives back its own and goes
back to the queue, to be computed again later, but for what the cache still holds. The first always goes on, so that all
end; none is failed. A request that could not have blocks enough if it were alone is refused when it comes.
"""

import sys
from bisect import insort
from dataclasses import dataclass, field
from operator import attrgetter

from manyhands.engine.blocks import Blocks
from manyhands.engine.request import FinishReason, Request
from manyhands.errors import UserError

AGEING = 256
"""Steps that one level of priority is worth."""
MOST_PRIORITY = 100
"""Levels, either way."""
MOST_SCORED = 256
"""Tokens of a step whose logits are all wanted: a row of them is as wide as the vocabulary."""

_rank = attrgetter("rank")


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next `count` tokens of a request."""

    request: Request
    count: int

    @property
    def draws(self) -> bool:
        """Whether it reaches the request's last token, from which the next one is drawn."""
        return self.count == self.request.num_waiting


@dataclass(slots=True)
class Plan:
    """A step."""

    chunks: list[Chunk] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)
    """Requests whose cache is void."""
    left: int = 0
    """Tokens there is room for yet."""
    scored: int = MOST_SCORED
    """Of those, of which all logits are wanted."""

    def room(self, request: Request) -> int:
        """Tokens of the request that would go in."""
        most = min(self.left, request.num_waiting)
        return min(most, self.scored) if request.scores_prompt else most

    def add(self, request: Request) -> None:
        """As many as go in."""
        if count := self.room(request):
            self.chunks.append(Chunk(request, count))
            self.left -= count
            self.scored -= count * request.scores_prompt


class Scheduler:
    """The queue, and what runs. `schedule` plans a step, `advance` says that it was run."""

    def __init__(
        self, blocks: Blocks, max_sequences: int, max_batch_tokens: int | None = None, caching: bool = False
    ) -> None:
        """`max_batch_tokens` None: no prompt is cut. `caching`: what was computed is found again by who needs it."""
        assert max_sequences > 0 and (max_batch_tokens is None or max_batch_tokens > 0)
        self.blocks, self.max_sequences, self.caching = blocks, max_sequences, caching
        self.max_batch_tokens = sys.maxsize if max_batch_tokens is None else max_batch_tokens
        self.epoch = 0
        """What passes of another epoch left is not found: the weights were others."""
        self.num_preemptions = 0
        self.waiting: list[Request] = []
        """The first in rank first."""
        self.running: list[Request] = []
        """So too."""
        self._clock = 0

    @property
    def busy(self) -> bool:
        """Whether there is work."""
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        """Queue it. Raises `UserError` if all the blocks there are would not be enough for it."""
        needed = self.blocks.needed(request.most_cached)
        if needed > self.blocks.num_blocks:
            size = self.blocks.block_size
            raise UserError(
                f"{len(request.prompt_ids)} tokens of prompt and up to {request.max_length - len(request.prompt_ids)} "
                f"new ones need {needed} blocks of {size} tokens; the cache has {self.blocks.num_blocks}: ask for "
                "fewer new tokens, or give the engine a larger cache"
            )
        if abs(request.priority) > MOST_PRIORITY:
            raise UserError(f"priority is {request.priority}; it is from -{MOST_PRIORITY} to {MOST_PRIORITY}")
        request.rank = self._clock + AGEING * request.priority, request.id
        insort(self.waiting, request, key=_rank)

    def schedule(self) -> Plan:
        """The next step. It is not empty while there is work."""
        self._clock += 1
        plan = Plan(left=self.max_batch_tokens)
        for request in [r for r in self.running if r.num_waiting == 1]:
            if plan.left and request in self.running and self._make_room(request, plan):
                plan.add(request)
        for request in self.running:
            if request.num_waiting > 1:  # admitted with blocks for all of it
                plan.add(request)
        if plan.left and self.waiting and not plan.preempted:
            self._admit(plan)
        return plan

    def advance(self, chunk: Chunk) -> None:
        """The chunk's tokens are in the cache."""
        request = chunk.request
        request.num_computed += chunk.count
        if self.caching and request.num_computed // self.blocks.block_size > request.table.num_published:
            request.table.publish(request.keys(self.epoch), request.num_computed)

    def put_back(self, request: Request) -> None:
        """A running one gives back its blocks and waits again."""
        request.table.free()
        request.num_computed = 0
        request.num_preemptions += 1
        self.running.remove(request)
        insort(self.waiting, request, key=_rank)

    def end(self, request: Request, reason: FinishReason) -> None:
        """It leaves at once, from wherever it is, and its blocks are free. One that has ended stays as it ended."""
        if request.finish_reason is not None:
            return
        request.finish_reason = reason
        request.table.free()
        if request in self.running:
            self.running.remove(request)
        else:
            self.waiting.remove(request)

    def _admit(self, plan: Plan) -> None:
        """Waiting requests, the first in rank first, into the room that is left."""
        coming: set[bytes] = set()
        if self.caching:
            for request in self.running:
                coming.update(self._coming(request))
        at = 0
        while at < len(self.waiting) and len(self.running) < self.max_sequences:
            request = self.waiting[at]
            if not plan.room(request):
                break
            found = self._find(request)
            if coming and self._next_key(request, len(found)) in coming:
                at += 1
                continue
            if not self._take(request, found):
                break
            del self.waiting[at]
            insort(self.running, request, key=_rank)
            plan.add(request)
            if self.caching:
                coming.update(self._coming(request))

    def _coming(self, request: Request) -> list[bytes]:
        """The keys of blocks that a running request is about to fill with what it already has."""
        if request.num_waiting == 1:
            return []
        return request.keys(self.epoch)[request.num_computed // self.blocks.block_size :]

    def _keys(self, request: Request) -> list[bytes]:
        """Of the blocks that it may take: not all it has, since its next token is drawn from what a pass makes."""
        if not self.caching or request.num_computed:
            return []
        most = min(request.most_shared, request.num_tokens - 1)
        return request.keys(self.epoch)[: most // self.blocks.block_size]

    def _find(self, request: Request) -> list[int]:
        return self.blocks.find(self._keys(request))

    def _next_key(self, request: Request, found: int) -> bytes | None:
        keys = self._keys(request)
        return keys[found] if found < len(keys) else None

    def _take(self, request: Request, found: list[int]) -> bool:
        """Blocks for all it has so far: those it found, and new ones. Whether there are enough."""
        table = request.table
        if found:
            idle = sum(not self.blocks.holders(block) for block in found)
            if self.blocks.needed(request.num_tokens) - len(found) > self.blocks.num_free - idle:
                return False
            table.adopt(found)
            request.num_computed = table.length
            if not request.num_preemptions:
                request.num_cached = table.length
        return table.reserve(request.num_tokens)

    def _make_room(self, request: Request, plan: Plan) -> bool:
        """Blocks for the request's next token, if need be from the last in rank. False: it is the last itself."""
        while not request.table.reserve(request.num_tokens):
            last = self.running[-1]
            self.put_back(last)
            self.num_preemptions += 1
            plan.preempted.append(last)
            if last is request:
                return False
        return True
