"""One engine on a thread of its own, with asyncio in front.

    service = Service(engine)
    service.start()
    async for token in await service.submit("def main", SamplingConfig()):
        print(token.text)

The engine's thread does everything that touches the engine: it takes what came in, runs a step, and hands the tokens
to the event loops that wait for them. Who stops listening has its requests ended before the next step.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from manyhands.config import SamplingConfig
from manyhands.engine import ledger
from manyhands.engine.answer import Token
from manyhands.engine.answers import Answers, Event, Submission
from manyhands.engine.asked import Asked, EngineDead, Overloaded, Stopping
from manyhands.engine.counters import Counters
from manyhands.engine.engine import Engine, Prompt
from manyhands.engine.ledger import bytes_of_experts
from manyhands.engine.request import Request
from manyhands.errors import ManyhandsError

_log = logging.getLogger(__name__)
_CLOSING_SECONDS = 10.0
"""For what `closing` writes."""
PATIENCE = 10.0
"""Seconds without a step, while there is work, after which an engine is not healthy."""


class Service:
    """Any thread and any event loop may submit; `start` and `close` are called once each."""

    def __init__(
        self,
        engine: Engine,
        *,
        max_waiting: int = 128,
        patience: float = PATIENCE,
        closing: Callable[[], None] | None = None,
    ) -> None:
        """Beside those that run, `max_waiting` requests may wait. `closing` is called when the engine's thread ends."""
        self.engine, self.counters = engine, Counters(engine.model.config, bytes_of_experts(engine.model))
        self._most = engine.scheduler.max_sequences + max_waiting
        self._patience, self._on_closing = patience, closing
        self._thread = threading.Thread(target=self._run, name="manyhands-engine", daemon=True)
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()  # guards the inbox and what stands below
        self._open = 0
        self._stopping = self._closing = False
        self._live: dict[int, Submission] = {}  # the engine's thread alone
        self._failure: BaseException | None = None
        self._moved = time.monotonic()

    def start(self) -> None:
        """Start the engine's thread."""
        self._thread.start()

    def close(self, timeout: float | None = None) -> None:
        """End what has not ended, then the thread. Waits for a step that is running, `timeout` seconds at most."""
        with self._wake:
            self._stopping = self._closing = True
            self._wake.notify()
        if self._thread.ident is not None:
            if self._on_closing is not None and timeout is not None:
                timeout = max(timeout, _CLOSING_SECONDS)
            self._thread.join(timeout)

    @property
    def stuck(self) -> bool:
        """Whether a step runs on though the service was closed."""
        return self._closing and self._thread.is_alive()

    async def drain(self, timeout: float) -> None:
        """Take nothing new, and wait until all has ended; what has not after `timeout` seconds is ended."""
        self.stop()
        until = time.monotonic() + timeout
        while self.num_open and not self.dead and time.monotonic() < until:
            await asyncio.sleep(0.02)
        if self.num_open and not self.dead:
            self._post(self._end_all)
            until = time.monotonic() + 1.0  # a step that runs is waited for, but not for ever
            while self.num_open and time.monotonic() < until:
                await asyncio.sleep(0.02)
        if self.num_open and not self.dead:  # it does not end: who waits is told, though the engine still has them
            gone = Stopping("the server is stopping")
            self._deliver([Event(submission, None, True, gone) for submission in list(self._live.values())])

    def stop(self) -> None:
        """Take nothing new: `submit` raises `Stopping`."""
        with self._wake:
            self._stopping = True

    @property
    def stopping(self) -> bool:
        """Whether nothing new is taken."""
        return self._stopping

    @property
    def num_open(self) -> int:
        """Requests that have not ended, running and waiting."""
        return self._open

    @property
    def num_running(self) -> int:
        """Requests that the engine works on."""
        return len(self.engine.scheduler.running)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for it."""
        return max(0, self._open - self.num_running)

    @property
    def full(self) -> bool:
        """Whether another request would be `Overloaded`."""
        return self._open >= self._most

    @property
    def dead(self) -> bool:
        """Whether the engine's thread ended though nobody closed it."""
        started = self._thread.ident is not None
        return self._failure is not None or (started and not self._thread.is_alive() and not self._closing)

    @property
    def healthy(self) -> bool:
        """Whether the thread lives and the engine is idle or ran a step lately."""
        if self.dead or not self._thread.is_alive():
            return False
        return not self._open or time.monotonic() - self._moved < self._patience

    def check(self) -> None:
        """Raises `EngineDead`, `Stopping` or `Overloaded` where `submit` would now: before a prompt is even read."""
        if self.dead:
            raise EngineDead(self._why())
        if self._stopping:
            self.counters.refused["stopping"] += 1
            raise Stopping("the server is stopping and takes no new requests")
        if self.full:
            self.counters.refused["full"] += 1
            raise Overloaded(f"{self._open} requests are running or waiting, which is as many as may: try later")

    async def submit(self, prompt: Prompt, sampling: SamplingConfig, **arguments: Any) -> Submission:
        """One request, `arguments` being `Engine.add`'s. Raises what `submit_all` does."""
        (submission,) = (await self.submit_all([Asked(prompt, sampling, arguments)])).submissions
        return submission

    async def submit_all(self, asked: Sequence[Asked]) -> Answers:
        """Several requests, all of them taken or none.

        Raises `UserError` for what the engine refuses, `Overloaded` and `Stopping` at once, `EngineDead`.
        """
        loop = asyncio.get_running_loop()
        with self._wake:
            self.check()
            if not self._open:
                self._moved = time.monotonic()
            self._open += len(asked)
        taken: asyncio.Future[None] = loop.create_future()
        answers = Answers(loop, len(asked), self._cancel)
        self._post(lambda: self._add(answers, asked, taken))
        try:
            await taken
        except asyncio.CancelledError:
            answers.cancel()
            raise
        return answers

    def _post(self, job: Callable[[], None]) -> None:
        with self._wake:
            if self._failure is None:
                self._inbox.append(job)
                self._wake.notify()
                return
        job()  # the thread is gone: the job finds that out

    def _run(self) -> None:
        try:
            while self._wait():
                self._jobs()
                if self.engine.busy:
                    self._step()
        except BaseException as error:  # whatever it is, everybody who waits has to hear of it
            with self._wake:
                self._failure = error
        if self._on_closing is not None:
            try:
                self._on_closing()
            except ManyhandsError as error:  # a disk that refuses: the requests that wait hear no less
                _log.warning("%s", error)
        self._jobs()
        self._fail_all(EngineDead(self._why()) if self._failure else Stopping("the server has stopped"))

    def _wait(self) -> bool:
        """Sleep until there is something to do; False: the service is closed."""
        with self._wake:
            while not self._inbox and not self.engine.busy and not self._closing:
                self._wake.wait()
            return not self._closing

    def _jobs(self) -> None:
        while True:
            with self._wake:
                if not self._inbox:
                    return
                job = self._inbox.popleft()
            job()

    def _step(self) -> None:
        preempted = {r: r.num_preemptions for r in self.engine.scheduler.running}
        tokens = self.engine.step()
        self._moved = time.monotonic()
        self.counters.preemptions += sum(r.num_preemptions - before for r, before in preempted.items())
        if (ran := self.engine.ran) is not None:
            self.counters.step(ran.routed, len(tokens), ran.reads)
            if any(submission.ledger for submission in self._live.values()):
                live = [self._live.get(request.id) for request in ran.requests]
                ledgers = [None if submission is None else submission.ledger for submission in live]
                ledger.step(self.counters.sizes, ran.routed.layers, ran.starts, ledgers, ran.reads)
        last: dict[int, Token] = {}
        events: list[Event] = []
        for token in tokens:
            submission = self._live.get(token.request.id)
            if submission is None:
                continue
            if token.finish_reason is None:
                events.append(Event(submission, token))
            else:
                last[token.request.id] = token
        ended = [s for s in self._live.values() if s.request.finish_reason is not None]
        events += [self._ended(s, last.get(s.request.id)) for s in ended]
        self._deliver(events)

    def _ended(self, submission: Submission, token: Token | None = None) -> Event:
        """It has: the last event of it."""
        request = submission.request
        self._live.pop(request.id, None)
        submission.finish(self.engine.completion(request))
        self._left(1)
        self.counters.ended[request.finish_reason or "abort"] += 1
        self.counters.cached_tokens += getattr(request, "num_cached", 0)
        problem = getattr(request, "error", None)
        return Event(submission, token, True, None if problem is None else ManyhandsError(problem))

    def _add(self, answers: Answers, asked: Sequence[Asked], taken: "asyncio.Future[None]") -> None:
        """On the engine's thread."""
        requests: list[Request] = []
        problem: BaseException | None = EngineDead(self._why()) if self._failure else None
        try:
            for one in asked if problem is None else ():
                requests.append(self.engine.add(one.prompt, one.sampling, **one.arguments))
        except Exception as error:  # a request that cannot be is no reason to end the others
            problem = error if isinstance(error, ManyhandsError) else _unexpected(error)
            for request in requests:
                self.engine.abort(request)
        if problem is not None:
            self._left(len(asked))
        else:
            for submission, request, one in zip(answers.submissions, requests, asked, strict=True):
                submission.begin(request, one.ledger)
                self._live[request.id] = submission
                self.counters.prompt_tokens += len(request.prompt_ids)

        def tell() -> None:
            if taken.done():
                answers.cancel()
            elif problem is None:
                taken.set_result(None)
            else:
                taken.set_exception(problem)

        if not _call(answers.loop, tell) and problem is None:
            self._end(answers.submissions)

    def _cancel(self, submissions: Sequence[Submission]) -> None:
        self._post(lambda: self._end(submissions))

    def _end(self, submissions: Sequence[Submission]) -> None:
        events: list[Event] = []
        for submission in submissions:
            if submission.begun and submission.request.id in self._live:
                self.engine.abort(submission.request)
                events.append(self._ended(submission))
        self._deliver(events)

    def _end_all(self) -> None:
        self._end(list(self._live.values()))

    def _fail_all(self, error: ManyhandsError) -> None:
        live, self._live = list(self._live.values()), {}
        self._left(len(live))
        self._deliver([Event(submission, None, True, error) for submission in live])

    def _left(self, count: int) -> None:
        with self._wake:
            self._open -= count

    def _deliver(self, events: Sequence[Event]) -> None:
        """To each loop what is its own, in one call."""
        by_loop: dict[asyncio.AbstractEventLoop, list[Event]] = {}
        for event in events:
            by_loop.setdefault(event.submission.answers.loop, []).append(event)
        for loop, own in by_loop.items():
            if not _call(loop, lambda own=own: [e.submission.answers.put(e) for e in own]):  # type: ignore[misc]
                self._end([event.submission for event in own])

    def _why(self) -> str:
        return f"the engine has stopped on an error: {type(self._failure).__name__}: {self._failure}"


def _unexpected(error: Exception) -> ManyhandsError:
    return ManyhandsError(f"{type(error).__name__}: {error}")


def _call(loop: asyncio.AbstractEventLoop, job: Callable[[], Any]) -> bool:
    """Have the loop do it; False: it is closed, and nobody waits any more."""
    try:
        loop.call_soon_threadsafe(job)
    except RuntimeError:
        return False
    return True
