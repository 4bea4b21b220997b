"""Whatever is sent, the answer is an error object with a 4xx, and the next good request is answered."""

import json
import socket
import time

import pytest

from manyhands.serve import limits, run

from .running import error_of, until

JSON = {"Content-Type": "application/json"}
GOOD = {"prompt": "def", "max_tokens": 2, "temperature": 0}
BODIES = {
    "empty": b"",
    "blank": b"  \n",
    "cut": b'{"prompt": "a"',
    "a list": b"[]",
    "null": b"null",
    "a number": b"5",
    "a text": b'"prompt"',
    "bad UTF-8": b'{"prompt": "\xff\xfe"}',
    "UTF-16": '{"prompt": "a"}'.encode("utf-16"),
    "NaN": b'{"prompt": "a", "temperature": NaN}',
    "Infinity": b'{"prompt": "a", "temperature": Infinity}',
    "1e999": b'{"prompt": "a", "temperature": 1e999}',
    "twice": b'{"prompt": "a", "prompt": "b"}',
    "an endless number": b'{"prompt": "a", "max_tokens": ' + b"9" * 10000 + b"}",
    "deep lists": b'{"prompt": ' + b"[" * 100000 + b"]" * 100000 + b"}",
    "deep objects": b'{"a":' * 50000 + b"1" + b"}" * 50000,
    "a null byte": b'{"prompt": "a"}\x00',
    "comments": b'{"prompt": "a" /* hello */}',
    "a form": b"prompt=a&max_tokens=5",
    "model a number": b'{"model": 5, "prompt": "a"}',
    "model a list": b'{"model": ["tiny"], "prompt": "a"}',
}


def send(port, data, wait=1.0):
    """Raw bytes to the server, and all that comes back until it closes or `wait` is over."""
    with socket.create_connection(("127.0.0.1", port), timeout=wait) as connection:
        connection.sendall(data)
        found = b""
        try:
            while chunk := connection.recv(65536):
                found += chunk
        except (TimeoutError, ConnectionResetError):
            pass
        return found


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
def test_bodies_that_are_no_request(server, path):
    for name, body in BODIES.items():
        reply = server.client.post(path, content=body, headers=JSON)
        assert error_of(reply, 400)["type"] == "invalid_request_error", name
    assert server.post("/v1/completions", **GOOD).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/completions", 405),
        ("PUT", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models/tiny", 405),
        ("POST", "/health", 405),
        ("POST", "/", 405),
        ("POST", "/v1/nope", 404),
        ("GET", "/v1", 404),
        ("GET", "/v1/", 404),
        ("GET", "/v1/models/", 404),
        ("GET", "/v1/models/nope", 404),
        ("GET", "/v1/models/..%2f..%2fetc%2fpasswd", 404),
        ("GET", "/v1/models/%00%0d%0aSet-Cookie:x", 404),
        ("GET", "/%0d%0aX-Evil:%201", 404),
        ("GET", "/page.html", 404),
        ("GET", "/v1/routing?model=nope", 404),
        ("BREW", "/v1/models", 405),
    ],
)
def test_routes_that_are_not(server, method, path, status):
    reply = server.client.request(method, path)
    error = error_of(reply, status)
    assert "X-Evil" not in reply.headers and "Set-Cookie" not in reply.headers
    assert all(c.isprintable() for c in error["message"])
    if status == 405:
        assert reply.headers["allow"]


def test_unknown_models(server):
    for path, body in {"/v1/completions": GOOD, "/v1/chat/completions": {"messages": [1]}, "/tokenize": {}}.items():
        error = server.bad(path, 404, **{**body, "model": "nope"})
        assert error["code"] == "model_not_found" and error["param"] == "model" and "nope" in error["message"]


def test_tokens_that_are_none(server):
    for tokens in (None, "a", [-1], [330], [1.5], [True], ["a"], [[1]], {}):
        server.bad("/detokenize", tokens=tokens)
    for body in ({}, {"prompt": 5}, {"prompt": ["a"]}, {"messages": "x"}, {"prompt": "a", "add_special_tokens": 1}):
        server.bad("/tokenize", **body)
    assert server.ok("/detokenize", tokens=[])["prompt"] == ""


def test_text_goes_round(server):
    text = "héllo 🤗 \x00 def"
    found = server.ok("/tokenize", prompt=text, return_token_strs=True)
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"]) and found["max_model_len"] == 192
    assert server.ok("/detokenize", tokens=found["tokens"])["prompt"] == text


def test_a_body_that_is_too_long_is_refused_before_it_is_read(serving):
    with serving(body_bytes=1000) as running:
        long = json.dumps({**GOOD, "user": "x" * 2000})
        assert error_of(running.client.post("/v1/completions", content=long, headers=JSON), 413)

        def chunks():
            for _ in range(50):
                yield b" " * 100

        assert error_of(running.client.post("/v1/completions", content=chunks(), headers=JSON), 413)
        claimed = send(
            running.port, b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999\r\n\r\n{"
        )
        assert claimed.startswith(b"HTTP/1.1 413")
        assert running.post("/v1/completions", **GOOD).status_code == 200


def test_headers_that_are_too_long(server):
    for head in (b"X-A: " + b"a" * 70000, b"".join(b"X-%d: %s\r\n" % (i, b"b" * 100) for i in range(1000))):
        reply = send(server.port, b"GET /health HTTP/1.1\r\nHost: a\r\n" + head + b"\r\n\r\n")
        assert reply == b"" or (reply.startswith(b"HTTP/1.1 4") and b'"error"' in reply)
    assert send(server.port, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n").startswith(b"HTTP/1.1 400")
    assert server.client.get("/health").status_code == 200


def test_clients_that_take_their_time_are_cut_off(serving, monkeypatch):
    monkeypatch.setattr(run, "HEADER_SECONDS", 0.2)
    monkeypatch.setattr(limits, "BODY_SECONDS", 0.2)
    with serving() as running:
        assert send(running.port, b"") == b""
        assert send(running.port, b"GET /health HTTP/1.1\r\nX-Slow: ") == b""
        late = send(running.port, b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 50\r\n\r\n{")
        assert late.startswith(b"HTTP/1.1 408")
        with socket.create_connection(("127.0.0.1", running.port), timeout=3) as drip:
            begin = time.monotonic()
            with pytest.raises(OSError):  # a byte at a time does not help
                for _ in range(100):
                    drip.sendall(b"G")
                    time.sleep(0.03)
            assert time.monotonic() - begin < 3
        for _ in range(2):  # a connection that is kept between requests is not
            assert running.client.get("/health").status_code == 200
            time.sleep(0.3)
        until(lambda: running.service.num_open == 0)


def test_a_client_that_does_not_read_is_cut_off(serving, monkeypatch):
    monkeypatch.setattr(run, "WRITE_SECONDS", 0.2)
    body = json.dumps({"prompt": "é" * 700_000}).encode()
    head = b"POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body)
    with serving(body_bytes=20 << 20) as running, socket.socket() as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.connect(("127.0.0.1", running.port))
        lazy.sendall(head + body)
        until(lambda: running.models.entries["tiny"].num_users == 1)
        until(lambda: not running.server.server_state.connections)
        assert running.client.get("/health").status_code == 200


def test_a_request_may_not_take_for_ever(serving):
    from .running import slow

    with serving(timeout=0.2) as running:
        slow(running.service, 0.02)
        error = error_of(running.post("/v1/completions", prompt="a", max_tokens=150, ignore_eos=True), 504)
        assert error["code"] == "timeout"
        events = running.events("/v1/completions", prompt="a", max_tokens=150, ignore_eos=True)
        assert events[-1]["error"]["code"] == "timeout" and "choices" in events[0]
        until(lambda: running.service.num_open == 0)
