"""A server on a thread of this process, and what its tests ask again and again."""

import asyncio
import json
import threading
import time

import httpx2

from manyhands.serve import app as application
from manyhands.serve import run


class Running:
    """A server on a thread, and a client of it."""

    def __init__(self, models, keys=(), patience=5.0, **how):
        self.models = models
        self.app = application.build(models, keys, **how)
        for entry in models.entries.values():
            if entry.served is not None:
                models.on_load(entry.served)
        bound = run.bind("127.0.0.1", 0)
        self.server = run.server_of(self.app, models, bound, patience)
        self.base = run.address_of(bound)
        self.port = bound.getsockname()[1]
        self.thread = threading.Thread(target=lambda: asyncio.run(self.server.serve(sockets=[bound])))
        self.thread.start()
        self.client = httpx2.Client(base_url=self.base, timeout=30)
        until(lambda: self.server.started)

    @property
    def service(self):
        return next(iter(self.models.entries.values())).served.service

    def post(self, path, **body):
        content = json.dumps({"temperature": 0, **body})  # all of it ASCII: half a surrogate pair can be sent
        return self.client.post(path, content=content, headers={"Content-Type": "application/json"})

    def ok(self, path, **body):
        reply = self.post(path, **body)
        assert reply.status_code == 200, reply.text
        return reply.json()

    def bad(self, path, status=400, **body):
        reply = self.post(path, **body)
        return error_of(reply, status)

    def events(self, path, **body):
        """The data of a stream: objects, and its last word."""
        with self.client.stream("POST", path, json={"temperature": 0, "stream": True, **body}) as reply:
            assert reply.status_code == 200, reply.read()
            assert reply.headers["content-type"].startswith("text/event-stream")
            data = b"".join(reply.iter_raw()).decode("utf-8")
        blocks = [block for block in data.split("\n\n") if block and not block.startswith(":")]
        assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
        return [json.loads(block[6:]) if block != "data: [DONE]" else "[DONE]" for block in blocks]

    def stop(self):
        self.client.close()
        self.server.should_exit = True
        self.thread.join(10)
        self.models.close()
        assert not self.thread.is_alive()


def error_of(reply, status):
    """The error object of a reply."""
    assert reply.status_code == status, f"{reply.status_code}: {reply.text[:200]}"
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and error["type"]
    return error


def until(what, seconds=10.0):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


def slow(service, seconds=0.01):
    """Each step takes as long."""
    step = service.engine.step

    def slowly():
        time.sleep(seconds)
        return step()

    service.engine.step = slowly
