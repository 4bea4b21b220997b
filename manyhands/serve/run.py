"""From an application to a process that serves it: the socket, uvicorn with limits, signals, and the way out.

SIGTERM and SIGINT: what runs is finished, new requests get 503, and the process ends with 0; a second one ends it at
once. An engine that died: requests get 500, `/health` 503, and after two seconds the process ends with 1.
"""

import asyncio
import errno
import ipaddress
import logging
import os
import socket
import sys
from types import FrameType
from typing import Any

import h11
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from manyhands.errors import UserError
from manyhands.serve.errors import ApiError
from manyhands.serve.limits import HEADER_BYTES
from manyhands.serve.models import Models
from manyhands.serve.sse import dumps

log = logging.getLogger(__name__)
HEADER_SECONDS = 10.0
"""For the whole head of a request to arrive."""
WRITE_SECONDS = 60.0
"""For a client to read on, when it has left an answer lying."""
KEEP_ALIVE = 30
"""Seconds that a connection may be idle between requests."""
_LAST_WORDS = 2.0
"""Seconds in which a server whose engine is dead still says so."""


def is_local(host: str) -> bool:
    """Whether only this machine can reach it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bind(host: str, port: int) -> socket.socket:
    """A socket to listen at. Raises `UserError` where there can be none."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host {host}: no such address: {error}") from None
    family, kind, proto, _, address = found[0]
    bound = socket.socket(family, kind, proto)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise UserError(f"{host}:{port}: cannot be listened at: {_why(error)}") from None
    bound.set_inheritable(False)
    return bound


def _why(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "another process does; give another --port, or --port 0 for any that is free"
    if error.errno == errno.EACCES:
        return f"{error.strerror}; ports from 1024 on need no special right"
    return error.strerror or str(error)


def address_of(bound: socket.socket) -> str:
    """`http://…`, as one types it."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def server_of(app: Starlette, models: Models, bound: socket.socket, patience: float) -> "Server":
    """uvicorn with our limits. `patience` seconds to finish what runs when it is to stop."""
    config = uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=HEADER_BYTES,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=1,
    )
    return Server(config, models, patience, bound)


def serve(app: Starlette, models: Models, bound: socket.socket, patience: float) -> int:
    """Until a signal comes or an engine dies; the exit code."""
    server = server_of(app, models, bound, patience)
    asyncio.run(server.serve(sockets=[bound]))
    models.close()
    if any(served.service.stuck for served in models.loaded):
        sys.stdout.flush()
        os._exit(server.code)  # a step that does not end would hold the interpreter
    return server.code


class Server(uvicorn.Server):
    """uvicorn's, which finishes what runs while it says no to what comes, and sees whether the engines live."""

    def __init__(self, config: uvicorn.Config, models: Models, patience: float, bound: socket.socket) -> None:
        super().__init__(config)
        self.models, self.patience, self.address, self.code = models, patience, address_of(bound), 0
        self._drain: asyncio.Task[None] | None = None
        self._signals = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: begin to stop; the second one: stop."""
        self._signals += 1
        if self._signals > 1:
            os._exit(128 + sig)

    async def main_loop(self) -> None:
        """Until everything is done."""
        print(f"serving {', '.join(self.models.entries)} at {self.address}", flush=True)
        dead = 0.0
        await super().on_tick(0)
        tick = 0
        while not self.should_exit:
            await asyncio.sleep(0.1)
            tick += 1
            await super().on_tick(tick)
            if self._signals and self._drain is None:
                self._drain = asyncio.ensure_future(self._finish())
            if any(served.service.dead for served in self.models.loaded):
                self.code = 1
                if not dead:
                    log.error("an engine has died: the server ends")
                dead += 0.1
                self.should_exit = self.should_exit or dead > _LAST_WORDS

    async def _finish(self) -> None:
        log.info("stopping: %d requests are finished first", sum(s.service.num_open for s in self.models.loaded))
        self.models.stopping = True
        await asyncio.gather(*(served.service.drain(self.patience) for served in self.models.loaded))
        await asyncio.sleep(0.2)  # for their last words to be written
        self.should_exit = True


class Protocol(H11Protocol):
    """uvicorn's HTTP/1.1, with time limits for who sends a head or reads an answer, and errors as error objects."""

    _head_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """The clock for the first head starts."""
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """No clock any more."""
        self._stop_head_timer()
        self._stop_write_timer()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client does not read: the clock starts."""
        super().pause_writing()
        self._stop_write_timer()
        self._write_timer = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """It does."""
        self._stop_write_timer()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        """A head may be complete with this; or begin, after an answer."""
        if self._idle and self._head_timer is None:
            self._await_head()
        super().data_received(data)
        if not self._idle:
            self._stop_head_timer()

    def send_400_response(self, msg: str) -> None:
        """The error object, where uvicorn writes plain text."""
        body = dumps(ApiError(400, f"not a valid HTTP request, or headers of over {HEADER_BYTES >> 10} KiB").body())
        head = [(b"content-type", b"application/json"), (b"connection", b"close")]
        head.append((b"content-length", str(len(body)).encode()))
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            for event in (
                h11.Response(status_code=400, headers=head, reason=b"Bad Request"),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    @property
    def _idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _await_head(self) -> None:
        self._stop_head_timer()
        self._head_timer = self.loop.call_later(HEADER_SECONDS, self._too_slow)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _too_slow(self) -> None:
        self._head_timer = None
        if self._idle and not self.transport.is_closing():
            self.transport.close()
