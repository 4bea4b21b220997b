"""Keys, the page, what is listened at."""

import pytest

from manyhands.errors import UserError
from manyhands.serve import run
from manyhands.serve.origins import origins

from .running import error_of

ROUTES = [
    ("GET", "/v1/models"),
    ("GET", "/v1/models/tiny"),
    ("GET", "/metrics"),
    ("GET", "/version"),
    ("GET", "/routing"),
    ("GET", "/tokenizer_info"),
    ("POST", "/v1/completions"),
    ("POST", "/chat/completions"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/nowhere"),
    ("DELETE", "/v1/models"),
    ("GET", "/health/"),
]


@pytest.fixture(scope="module")
def locked(serving):
    with serving(keys=[b"first-key", b"second-key"]) as running:
        yield running


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_needs_a_key(locked, method, path):
    wrong = ["", "Bearer", "Bearer wrong", "Basic first-key", "first-key", "Bearer first-key2", "Bearer é"]
    for given in wrong:
        reply = locked.client.request(method, path, headers={"Authorization": given.encode("latin-1")})
        assert error_of(reply, 401)["type"] == "authentication_error"
        assert reply.headers["www-authenticate"] == "Bearer"
    for headers in ({"Authorization": "Bearer second-key"}, {"authorization": "bearer first-key"}):
        assert locked.client.request(method, path, headers=headers).status_code != 401
    assert locked.client.request(method, path, headers={"X-Api-Key": "first-key"}).status_code != 401


def test_whether_it_lives_and_the_page_need_none(locked):
    assert locked.client.get("/health").json() == {"status": "ok"}
    page = locked.client.get("/")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy


def test_only_this_machine_is_local():
    assert all(map(run.is_local, ["127.0.0.1", "127.1.2.3", "::1", "localhost"]))
    assert not any(map(run.is_local, ["0.0.0.0", "::", "192.168.0.1", "10.0.0.1", "example.org", ""]))


def test_an_address_that_is_taken_is_said_in_one_line():
    first = run.bind("127.0.0.1", 0)
    first.listen()
    try:
        port = first.getsockname()[1]
        assert run.address_of(first) == f"http://127.0.0.1:{port}"
        with pytest.raises(UserError, match=rf":{port}: cannot be listened at: another .*--port 0"):
            run.bind("127.0.0.1", port)
    finally:
        first.close()
    with pytest.raises(UserError, match="no such address"):
        run.bind("no such host", 0)


PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
HERE = ("http://localhost:3000", "http://127.0.0.1", "https://app.localhost", "http://[::1]:8")
ELSEWHERE = (
    "https://evil.example",
    "null",
    "http://localhost.evil.example",
    "http://127.0.0.1.evil.example:80",
    "http://evil.example/?http://localhost:3000",
    "http://[::1]:8.evil.example",
    "x" * 3000 + "\x7f",
)


def completed(running, **headers):
    body = {"prompt": "def", "max_tokens": 1}
    return running.client.post("/v1/completions", json=body, headers=headers)


@pytest.mark.parametrize("closed", [True, False])
def test_web_pages_of_elsewhere_need_to_be_allowed(serving, closed):
    friend = "https://chat.example.org"
    with serving(origins=origins([friend]), closed=closed) as running:
        for origin in (*HERE, friend):
            asked = running.client.options("/v1/chat/completions", headers={"Origin": origin, **PREFLIGHT})
            assert asked.status_code == 200 and asked.headers["access-control-allow-origin"] == origin
            assert "authorization" in asked.headers["access-control-allow-headers"]
            reply = completed(running, Origin=origin)
            assert reply.status_code == 200 and reply.headers["access-control-allow-origin"] == origin
        for origin in ELSEWHERE:
            asked = running.client.options("/v1/chat/completions", headers={"Origin": origin, **PREFLIGHT})
            error = error_of(asked, 403)
            assert error["code"] == "origin_not_allowed" and "--allow-origin" in error["message"]
            reply = completed(running, Origin=origin)
            assert reply.status_code == (403 if closed else 200)
            assert "access-control-allow-origin" not in {**asked.headers, **reply.headers}
        assert "access-control-allow-origin" not in completed(running).headers
        assert error_of(running.client.options("/v1/chat/completions"), 405)["code"] == "method_not_allowed"
        page = running.client.post("/v1/messages", json={}, headers={"Origin": "https://evil.example"})
        assert not closed or page.json()["error"]["type"] == "permission_error"


def test_every_page_may_ask_where_that_was_said(serving):
    with serving(origins=origins(["*"]), closed=True, keys=[b"key"]) as running:
        asked = running.client.options("/v1/messages", headers={"Origin": "https://a.example", **PREFLIGHT})
        assert asked.status_code == 200 and asked.headers["access-control-allow-origin"] == "*"
        reply = completed(running, Origin="https://a.example")  # a page can read what is wrong
        assert error_of(reply, 401) and reply.headers["access-control-allow-origin"] == "*"


def test_origins_are_written_as_browsers_write_them():
    assert origins(["HTTPS://Chat.Example.org", "http://[::1]:80", "*", "null", "chrome-extension://ab"]) == [
        *("https://chat.example.org", "http://[::1]:80", "*", "null", "chrome-extension://ab")
    ]
    for text in ("", "chat.example.org", "https://a/", "https://a/b", "https://", "https://u@a", "https://a b", "**"):
        with pytest.raises(UserError, match=r"--allow-origin .*expected SCHEME://HOST"):
            origins([text])


def test_a_packed_body_is_refused_by_its_coding(locked):
    key = {"Authorization": "Bearer first-key"}
    for coding, status in (("gzip", 415), ("br", 415), ("identity", 200), ("", 200)):
        reply = completed(locked, **key, **{"Content-Encoding": coding})
        assert reply.status_code == status
        assert status == 200 or f"Content-Encoding: {coding}" in error_of(reply, 415)["message"]


def test_who_asks_as_another_server_is_asked_learns_what_there_is(locked):
    error = error_of(locked.client.post("/api/chat", json={}, headers={"X-Api-Key": "first-key"}), 404)
    assert "/api/chat" in error["message"] and "/v1/chat/completions" in error["message"]
