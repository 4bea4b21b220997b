"""What a caller of `Service` waits for: the tokens of one request, or of several as they come."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Self

from manyhands.engine.answer import Completion, Token
from manyhands.engine.draw import TokenLogprob
from manyhands.engine.ledger import Ledger
from manyhands.engine.request import Request
from manyhands.engine.state import state_of
from manyhands.errors import ManyhandsError


class Submission:
    """One request that a service has taken."""

    def __init__(self, answers: "Answers", number: int) -> None:
        self.answers, self.number = answers, number
        """What it was submitted with, and its place there."""
        self._request: Request | None = None
        self._completion: Completion | None = None
        self.ledger: Ledger | None = None
        """What it costs in experts, if somebody asked."""

    @property
    def request(self) -> Request:
        """The engine's. To be read only."""
        assert self._request is not None
        return self._request

    @property
    def begun(self) -> bool:
        """Whether the engine has it."""
        return self._request is not None

    def completion(self) -> Completion:
        """All of it, once it has ended: after its last token, or the end of the iterator."""
        if self._completion is None:
            raise ManyhandsError("the request has not ended")
        return self._completion

    def prompt_logprobs(self) -> list[TokenLogprob | None]:
        """Of the prompt's tokens, if they were asked for: all of them once there is a new token, or it has ended."""
        return state_of(self.request).prompt_logprobs

    def cancel(self) -> None:
        """End it before the next step."""
        self.answers.cancel([self])

    async def __aiter__(self) -> AsyncGenerator[Token, None]:
        """Its tokens, if it was submitted alone. Leaving early cancels."""
        async with self.answers as answers:
            async for _, token in answers.tokens():
                yield token

    def begin(self, request: Request, ledger: Ledger | None = None) -> None:
        """The service's to call."""
        self._request, self.ledger = request, ledger

    def finish(self, completion: Completion) -> None:
        """The service's to call."""
        self._completion = completion


@dataclass(frozen=True, slots=True)
class Event:
    """What the engine's thread says of a submission."""

    submission: Submission
    token: Token | None
    ended: bool = False
    error: ManyhandsError | None = None


class Answers:
    """The submissions of one caller. Leaving `async with` ends those that have not ended."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, count: int, cancel: Callable[[Sequence[Submission]], None]
    ) -> None:
        self.loop = loop
        """The caller's."""
        self.since = time.monotonic()
        """When it was asked."""
        self.submissions = [Submission(self, number) for number in range(count)]
        self._queue: asyncio.Queue[Event] = asyncio.Queue()
        self._left = count
        self._cancel = cancel

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()

    def cancel(self, submissions: Sequence[Submission] | None = None) -> None:
        """End these, or all, before the next step; what has ended stays as it ended."""
        if self._left:
            self._cancel(self.submissions if submissions is None else submissions)

    async def tokens(self, until: float | None = None) -> AsyncGenerator[tuple[int, Token], None]:
        """Each token as it is made, with its submission's place.

        Raises `ManyhandsError` for one that went wrong in the engine, and when the service ended under it;
        `TimeoutError` when the monotonic clock shows `until`.
        """
        while self._left:
            left = None if until is None else max(0.0, until - time.monotonic())
            event = await asyncio.wait_for(self._queue.get(), left)
            self._left -= event.ended
            if event.error is not None:
                self.cancel()
                raise event.error
            if event.token is not None:
                yield event.submission.number, event.token

    def put(self, event: Event) -> None:
        """The service's to call, in the caller's loop."""
        self._queue.put_nowait(event)
