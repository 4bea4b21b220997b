"""Clients that leave, more of them than there is room for, and the ways a server ends."""

import concurrent.futures as futures
import contextlib
import json
import threading
import time

import httpx2

from manyhands.serve import sse

from .running import error_of, slow, until

LONG = {"prompt": "a", "max_tokens": 180, "ignore_eos": True, "temperature": 0}
SHORT = {"prompt": "def", "max_tokens": 3}
PATH = "/v1/completions"


def test_who_leaves_has_his_requests_ended(serving):
    with serving(max_waiting=64) as running:
        blocks = running.service.engine.scheduler.blocks
        slow(running.service, 0.02)

        def leave(number):
            body = {**LONG, "stream": number % 2 == 0, "n": 1 + number % 3}
            with (
                contextlib.suppress(httpx2.ReadTimeout),
                httpx2.Client(base_url=running.base, timeout=0.3, verify=False) as client,
                client.stream("POST", PATH, json=body) as reply,
            ):
                next(reply.iter_raw())

        with futures.ThreadPoolExecutor(12) as pool:
            list(pool.map(leave, range(12)))
        begin = time.monotonic()
        running.ok(PATH, **SHORT)
        assert time.monotonic() - begin < 5
        until(lambda: running.service.num_open == 0)
        assert blocks.num_used == 0 and running.service.counters.ended["abort"] >= 12
        assert all(entry.num_users == 0 for entry in running.models.entries.values())


def test_a_stream_that_is_left_ends(serving):
    with serving() as running:
        slow(running.service, 0.02)
        with running.client.stream("POST", PATH, json={**LONG, "stream": True}) as reply:
            next(reply.iter_raw())
            assert running.service.num_open == 1
        until(lambda: running.service.num_open == 0)
        assert running.service.counters.ended == {"abort": 1}


def test_a_stream_says_that_it_is_there_while_a_prompt_takes_long(serving, monkeypatch):
    monkeypatch.setattr(sse, "PING", 0.03)
    with serving() as running:
        slow(running.service, 0.15)
        with running.client.stream("POST", PATH, json={**SHORT, "stream": True, "temperature": 0}) as reply:
            data = b"".join(reply.iter_raw()).decode()
        assert ": keepalive\n\n" in data and data.endswith("data: [DONE]\n\n")
        texts = [
            json.loads(line[6:])["choices"][0]["text"] for line in data.split("\n\n") if line.startswith("data: {")
        ]
        assert "".join(texts) == running.ok(PATH, **SHORT)["choices"][0]["text"]


def test_a_stream_that_is_left_while_it_waits_is_never_begun(serving):
    with serving(engine={"max_sequences": 1}) as running:
        slow(running.service, 0.02)
        with futures.ThreadPoolExecutor(1) as pool:
            first = pool.submit(running.ok, PATH, **{**LONG, "max_tokens": 90})
            until(lambda: running.service.num_running == 1)
            with contextlib.suppress(httpx2.ReadTimeout):
                httpx2.post(running.base + PATH, json={**LONG, "stream": True}, timeout=0.2)
            until(lambda: running.service.counters.ended == {"abort": 1})
            assert running.service.num_open == 1 and not first.done()
            assert first.result()["usage"]["completion_tokens"] == 90


def test_too_many_are_told_so_at_once_and_the_others_are_answered(serving):
    with serving(max_waiting=4, engine={"max_sequences": 2}) as running:
        slow(running.service, 0.03)
        running.ok(PATH, **SHORT)
        barrier = threading.Barrier(30)

        def ask(_):
            with httpx2.Client(base_url=running.base, timeout=30, verify=False) as client:
                barrier.wait()
                begin = time.monotonic()
                reply = client.post(PATH, json={**SHORT, "max_tokens": 8, "temperature": 0})
                return reply, time.monotonic() - begin

        with futures.ThreadPoolExecutor(30) as pool:
            replies = list(pool.map(ask, range(30)))
        good = [reply for reply, _ in replies if reply.status_code == 200]
        refused = [reply for reply, _ in replies if reply.status_code != 200]
        assert len(good) >= 6 and len({reply.json()["choices"][0]["text"] for reply in good}) == 1
        for reply in refused:
            assert error_of(reply, 429)["type"] == "rate_limit_error" and int(reply.headers["retry-after"]) > 0
        assert refused and running.client.get("/health").status_code == 200
        assert running.service.counters.refused["full"] == len(refused)


def test_stopping_finishes_what_runs_and_refuses_what_comes(serving):
    with serving() as running:
        slow(running.service, 0.02)
        with futures.ThreadPoolExecutor(2) as pool:
            whole = pool.submit(running.post, PATH, **{**LONG, "max_tokens": 40})
            stream = pool.submit(running.events, PATH, **{**LONG, "max_tokens": 40})
            until(lambda: running.service.num_open == 2)
            running.server.handle_exit(15, None)
            until(lambda: running.models.stopping)
            refused = httpx2.post(running.base + PATH, json=SHORT)
            assert error_of(refused, 503)["code"] == "stopping" and refused.headers["retry-after"]
            assert httpx2.get(running.base + "/health").status_code == 503
            assert whole.result().json()["usage"]["completion_tokens"] == 40
            assert stream.result()[-1] == "[DONE]"
        running.thread.join(5)
        assert not running.thread.is_alive() and running.server.code == 0


def test_stopping_without_patience_tells_who_waits(serving):
    with serving(patience=0.0) as running:
        slow(running.service, 0.05)
        with futures.ThreadPoolExecutor(2) as pool:
            whole = pool.submit(running.post, PATH, **LONG)
            stream = pool.submit(running.events, PATH, **LONG)
            until(lambda: running.service.counters.total.made > 4)
            until(lambda: running.service.num_open == 2)
            running.server.handle_exit(15, None)
            assert error_of(whole.result(), 503)["code"] == "stopping"
            assert stream.result()[-1]["error"]["code"] == "stopping"
        running.thread.join(4)
        assert not running.thread.is_alive()


def test_an_engine_that_dies_is_said_and_ends_the_server(serving):
    with serving() as running:
        step, go = running.service.engine.step, threading.Event()

        def dies():
            if go.is_set():
                raise RuntimeError("out of luck")
            time.sleep(0.01)
            return step()

        running.service.engine.step = dies
        with futures.ThreadPoolExecutor(2) as pool:
            whole = pool.submit(running.post, PATH, **LONG)
            stream = pool.submit(running.events, PATH, **LONG)
            until(lambda: running.service.counters.total.made > 4)
            until(lambda: running.service.num_open == 2)
            go.set()
            assert error_of(whole.result(), 500)["type"] == "server_error"
            assert stream.result()[-1]["error"]["type"] == "server_error"
        assert error_of(running.client.get("/health"), 503)["code"] == "unhealthy"
        assert error_of(running.post(PATH, **SHORT), 500)
        running.thread.join(6)
        assert not running.thread.is_alive() and running.server.code == 1


def test_a_request_that_breaks_the_server_is_a_500_without_its_words(serving, monkeypatch, caplog):
    with serving() as running, caplog.at_level("INFO", "manyhands"):
        secret = "a very private prompt"

        def broken(*_, **__):
            raise ValueError(secret)

        monkeypatch.setattr(type(running.service), "submit_all", broken)
        for reply in (running.post(PATH, prompt=secret), running.post(PATH, prompt=secret, stream=True)):
            assert error_of(reply, 500)["type"] == "server_error" and secret not in reply.text
        monkeypatch.undo()
        running.ok(PATH, prompt=secret, max_tokens=1)
        running.client.get("/v1/%0d%0aforged%1b[2J", headers={"Authorization": "Bearer very-secret-key"})
        assert "submit_all" in caplog.text and "'/v1/completions' 200" in caplog.text
        assert secret not in caplog.text and "very-secret-key" not in caplog.text
        assert "\\r\\nforged" in caplog.text and "\x1b" not in caplog.text
