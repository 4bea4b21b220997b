"""Keys, the page, what is listened at."""

import pytest

from manyhands.errors import UserError
from manyhands.serve import run

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
        with pytest.raises(UserError, match=f"127.0.0.1:{port}: cannot be listened at"):
            run.bind("127.0.0.1", port)
    finally:
        first.close()
    with pytest.raises(UserError, match="no such address"):
        run.bind("no such host", 0)
