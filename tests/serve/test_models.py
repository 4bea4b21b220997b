"""Many models: loaded when they are first asked for, given back by least recent use, never while they are used."""

import concurrent.futures as futures
import threading

import pytest

from manyhands.engine.engine import Engine
from manyhands.engine.service import Service
from manyhands.errors import CheckpointError, UserError
from manyhands.serve.models import Entry, Models
from manyhands.serve.served import Served

from .conftest import TEMPLATE
from .running import Running, error_of, slow, until

PATH = "/v1/completions"


@pytest.fixture
def many(model, tokenizer):
    """`many(sizes, memory)`: a server of models of these sizes, and the names that were loaded, in order."""
    started = []
    with_template = tokenizer.with_chat_template(TEMPLATE)

    def start(sizes, memory):
        loaded = []

        def load(name):
            if name == "broken":
                raise CheckpointError("config.json: it is not there")
            loaded.append(name)
            service = Service(Engine(model, with_template, max_sequences=2))
            service.start()
            return Served(name, service, with_template, model.config)

        entries = [Entry(name, lambda name=name: load(name), size) for name, size in sizes.items()]
        running = Running(Models(entries, memory))
        started.append(running)
        return running, loaded

    yield start
    for running in started:
        running.stop()


def ask(running, name, **how):
    return running.post(PATH, model=name, prompt="a", max_tokens=2, **how)


def in_memory(running):
    return [served.name for served in running.models.loaded]


def test_the_one_that_was_not_used_for_longest_is_given_back(many):
    running, loaded = many({"a": 4, "b": 4, "c": 5, "broken": 1}, 9)
    listed = running.client.get("/v1/models").json()
    assert [m["id"] for m in listed["data"]] == ["a", "b", "c", "broken"] and loaded == []
    assert running.client.get("/health").status_code == 200
    for name in ("a", "b", "a"):
        reply = ask(running, name)
        assert reply.status_code == 200 and reply.json()["model"] == name
    first = {entry.name: entry.served for entry in running.models.entries.values()}
    assert loaded == ["a", "b"]
    assert ask(running, "c").status_code == 200
    assert in_memory(running) == ["a", "c"] and not first["b"].service.healthy
    assert ask(running, "b").status_code == 200
    assert in_memory(running) == ["b", "c"] or in_memory(running) == ["a", "b"]
    assert ask(running, None).json()["model"] == "a"
    assert error_of(ask(running, "nope"), 404)["code"] == "model_not_found"
    assert "config.json" in error_of(ask(running, "broken"), 503)["message"]
    assert ask(running, "a").status_code == 200


def test_many_who_ask_at_once_load_it_once(many):
    running, loaded = many({"a": 1, "b": 1}, None)
    with futures.ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda i: ask(running, "ab"[i % 2]), range(8)))
    assert {reply.status_code for reply in replies} == {200} and sorted(loaded) == ["a", "b"]


def test_one_that_is_used_stays(many):
    running, _ = many({"a": 4, "b": 4}, 5)
    assert ask(running, "a").status_code == 200
    slow(running.models.entries["a"].served.service, 0.02)
    with futures.ThreadPoolExecutor(1) as pool:
        long = pool.submit(running.events, PATH, model="a", prompt="a", max_tokens=40, ignore_eos=True)
        until(lambda: running.models.loaded[0].service.num_open)
        refused = ask(running, "b")
        assert error_of(refused, 503)["code"] == "memory" and refused.headers["retry-after"]
        assert long.result()[-1] == "[DONE]"
    until(lambda: not running.models.entries["a"].num_users)
    assert ask(running, "b").status_code == 200 and in_memory(running) == ["b"]


def test_one_that_can_never_fit_is_said_at_the_start():
    with pytest.raises(UserError, match="big: its weights take 10 bytes"):
        Models([Entry("big", lambda: None, 10)], 9)


def test_the_server_answers_while_a_model_is_loaded(many):
    running, _ = many({"a": 1, "slow": 1}, None)
    entry, go = running.models.entries["slow"], threading.Event()
    load = entry.load
    entry.load = lambda: (go.wait(10), load())[1]
    with futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ask, running, "slow")
        until(lambda: entry.num_users)
        assert running.client.get("/health").status_code == 200
        assert running.client.get("/metrics").status_code == 200
        go.set()
        assert waiting.result().status_code == 200
