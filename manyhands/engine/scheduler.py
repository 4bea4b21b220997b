"""Who runs in the next step, and how many tokens of each. Needs no torch.

A step runs at most `max_batch_tokens` tokens of at most `max_sequences` requests. First come first served:

1. one token of each running request that is decoding;
2. of running requests with more to run, as much as the step has room for (their prompts, in chunks);
3. waiting requests, as long as there are blocks for all they have so far.

When a decoding request needs a block and none is free, the youngest running request gives back its own and goes to the
head of the queue, to be computed again later. The oldest always goes on, so that all end; none is failed. A request
that could not have blocks enough if it were alone is refused when it comes.
"""

import sys
from collections import deque
from dataclasses import dataclass, field

from manyhands.engine.blocks import Blocks
from manyhands.engine.request import FinishReason, Request
from manyhands.errors import UserError


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next `count` tokens of a request."""

    request: Request
    count: int

    @property
    def draws(self) -> bool:
        """Whether it reaches the request's last token, from which the next one is drawn."""
        return self.count == self.request.num_waiting


@dataclass(frozen=True, slots=True)
class Plan:
    """A step."""

    chunks: list[Chunk] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)
    """Requests whose cache is void."""


class Scheduler:
    """The queue, and what runs. `schedule` plans a step, `advance` says that it was run."""

    def __init__(self, blocks: Blocks, max_sequences: int, max_batch_tokens: int | None = None) -> None:
        """`max_batch_tokens` None: no prompt is cut."""
        assert max_sequences > 0 and (max_batch_tokens is None or max_batch_tokens > 0)
        self.blocks, self.max_sequences = blocks, max_sequences
        self.max_batch_tokens = sys.maxsize if max_batch_tokens is None else max_batch_tokens
        self.waiting: deque[Request] = deque()
        """Oldest first, and all younger than any that runs."""
        self.running: list[Request] = []
        """Oldest first."""

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
        self.waiting.append(request)

    def schedule(self) -> Plan:
        """The next step. It is not empty while there is work."""
        plan = Plan()
        left = self.max_batch_tokens
        for request in [r for r in self.running if r.num_waiting == 1]:
            if left and request in self.running and self._make_room(request, plan):
                plan.chunks.append(Chunk(request, 1))
                left -= 1
        for request in self.running:
            if left and request.num_waiting > 1:  # admitted with blocks for all of it
                plan.chunks.append(Chunk(request, min(left, request.num_waiting)))
                left -= plan.chunks[-1].count
        while left and self.waiting and len(self.running) < self.max_sequences:
            request = self.waiting[0]
            if not request.table.reserve(request.num_tokens):
                break
            self.running.append(self.waiting.popleft())
            plan.chunks.append(Chunk(request, min(left, request.num_waiting)))
            left -= plan.chunks[-1].count
        return plan

    def advance(self, chunk: Chunk) -> None:
        """The chunk's tokens are in the cache."""
        chunk.request.num_computed += chunk.count

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

    def _make_room(self, request: Request, plan: Plan) -> bool:
        """Blocks for the request's next token, if need be from the youngest. False: it is the youngest itself."""
        while not request.table.reserve(request.num_tokens):
            youngest = self.running.pop()
            youngest.table.free()
            youngest.num_computed = 0
            youngest.num_preemptions += 1
            self.waiting.appendleft(youngest)
            plan.preempted.append(youngest)
            if youngest is request:
                return False
        return True
