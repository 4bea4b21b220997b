"""/v1/responses and /v1/messages over HTTP: what chat says, in their own forms; errors too."""

import concurrent.futures as futures
import json

import pytest

from .running import slow, until

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
SAY = [{"role": "user", "content": "Hello"}]
SCHEMA = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"], "additionalProperties": False}


@pytest.fixture(scope="module")
def server(serving):
    """Its template tells the model nothing of tools: a schema would fill its context."""
    with serving(template="{% for m in messages %}{{ m.content }}{% endfor %}") as running:
        yield running


def named_events(server, path, **body):
    """(name, object) of a stream."""
    with server.client.stream("POST", path, json={"temperature": 0, "stream": True, **body}) as reply:
        assert reply.status_code == 200, reply.read()
        data = b"".join(reply.iter_raw()).decode("utf-8")
    found = []
    for block in data.split("\n\n"):
        if block and not block.startswith(":"):
            name, value = block.split("\n")
            found.append((name.removeprefix("event: "), json.loads(value.removeprefix("data: "))))
    assert all(name == value["type"] for name, value in found)
    return found


def test_a_response_says_what_chat_says(server):
    chat = server.ok(CHAT, messages=SAY, max_tokens=8)
    words = chat["choices"][0]["message"]["content"]
    reply = server.ok(RESPONSES, input="Hello", max_output_tokens=8, model="tiny")
    assert reply["object"] == "response" and reply["status"] == "incomplete"
    assert reply["output"][0]["content"][0]["text"] == words
    assert reply["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]
    events = named_events(server, RESPONSES, input="Hello", max_output_tokens=8)
    assert events[0][0] == "response.created" and events[-1][0] == "response.incomplete"
    assert "".join(e["delta"] for name, e in events if name == "response.output_text.delta") == words
    assert [e["sequence_number"] for _, e in events] == list(range(len(events)))


def test_a_message_says_what_chat_says(server):
    chat = server.ok(CHAT, messages=SAY, max_tokens=8)
    words = chat["choices"][0]["message"]["content"]
    asked = {"model": "tiny", "messages": SAY, "max_tokens": 8}
    reply = server.ok(MESSAGES, **asked)
    assert reply["type"] == "message" and reply["stop_reason"] == "max_tokens"
    assert reply["content"] == [{"type": "text", "text": words}]
    tokens = chat["usage"]["prompt_tokens"]
    assert reply["usage"]["input_tokens"] == tokens
    assert server.ok(f"{MESSAGES}/count_tokens", model="tiny", messages=SAY) == {"input_tokens": tokens}
    events = named_events(server, MESSAGES, **asked)
    assert events[0][0] == "message_start" and events[-1][0] == "message_stop"
    assert events[0][1]["message"]["usage"]["input_tokens"] == tokens
    deltas = [e["delta"] for name, e in events if name == "content_block_delta"]
    assert "".join(d["text"] for d in deltas) == words


def test_which_stop_ended_it(server):
    asked = {"messages": SAY, "max_tokens": 24}
    words = server.ok(CHAT, **asked)["choices"][0]["message"]["content"]
    stop = words[4:7]
    choice = server.ok(CHAT, stop=["never", stop], **asked)["choices"][0]
    assert choice["stop_reason"] == stop and choice["finish_reason"] == "stop"
    assert server.ok(CHAT, **asked)["choices"][0]["stop_reason"] is None
    reply = server.ok(MESSAGES, model="tiny", stop_sequences=["never", stop], **asked)
    assert (reply["stop_reason"], reply["stop_sequence"]) == ("stop_sequence", stop)
    (hello, *_) = server.ok("/tokenize", prompt="Hello", add_special_tokens=False)["tokens"]
    forced = {"messages": SAY, "logit_bias": {str(hello): 100}, "stop_token_ids": [hello], "max_tokens": 4}
    ended = [c for e in server.events(CHAT, **forced)[:-1] for c in e["choices"] if c["finish_reason"]]
    assert [(c["finish_reason"], c["stop_reason"]) for c in ended] == [("stop", hello)]
    assert server.ok(MESSAGES, model="tiny", **forced)["stop_reason"] == "end_turn"


def test_forms_and_tools_go_through(server):
    reply = server.ok(
        RESPONSES,
        input="Hello",
        text={"format": {"type": "json_schema", "name": "it", "schema": SCHEMA, "strict": True}},
    )
    assert json.loads(reply["output"][0]["content"][0]["text"])["a"] in ("x", "y") and reply["status"] == "completed"
    tool = {"name": "f", "input_schema": SCHEMA}
    choice = {"type": "tool", "name": "f"}
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 60}
    reply = server.ok(MESSAGES, tools=[tool], tool_choice=choice, **asked)
    assert reply["stop_reason"] == "tool_use" and reply["content"][-1]["input"]["a"] in ("x", "y")


@pytest.mark.parametrize("path", [MESSAGES, "/messages", f"{MESSAGES}/count_tokens"])
def test_errors_of_messages_have_their_form(server, path):
    reply = server.post(path, model="tiny", messages=[], max_tokens=4)
    error = reply.json()
    assert reply.status_code == 400 and error["type"] == "error"
    assert error["error"]["type"] == "invalid_request_error" and "messages" in error["error"]["message"]
    assert server.client.get(path).json()["type"] == "error"
    assert server.post(MESSAGES, model="nope", messages=SAY, max_tokens=4).json()["error"]["type"] == "not_found_error"


def test_errors_of_responses_are_openais(server):
    assert server.bad(RESPONSES, input=5)["param"] == "input"
    assert server.bad(RESPONSES, input="x", previous_response_id="resp_1")["param"] == "previous_response_id"
    assert server.client.get(f"{RESPONSES}/resp_1").status_code == 404
    assert server.client.delete(f"{RESPONSES}/resp_1").json()["error"]["code"] == "not_found"
    assert server.client.get(RESPONSES).status_code == 405
    assert server.bad(RESPONSES, input="x", metadata=5)["param"] == "metadata"


def test_errors_name_the_field_that_was_written(server):
    schema = {"type": "array", "uniqueItems": True}
    form = {"type": "json_schema", "schema": schema}
    error = server.bad(RESPONSES, input="x", text={"format": {**form, "name": "it"}})
    assert error["param"] == "text.format.schema" and error["message"].startswith("text.format.schema: ")
    long = server.bad(RESPONSES, input="Hello " * 400)
    assert long["param"] == "input" and long["code"] == "context_length_exceeded"
    asked = {"model": "tiny", "messages": SAY, "max_tokens": 4}
    for more, place in (
        ({"output_config": {"format": form}}, "output_config.format.schema"),
        ({"stop_sequences": ["x"] * 17}, "stop_sequences"),
        ({"tools": [{"name": "f", "input_schema": {"type": "array"}}]}, "tools[0].input_schema"),
        ({"model": None}, "model: this field is required"),
    ):
        reply = server.post(MESSAGES, **{**asked, **more})
        assert reply.status_code == 400 and reply.json()["error"]["message"].startswith(place), reply.text


def test_tokens_of_what_has_no_room_are_counted(server):
    found = server.ok(f"{MESSAGES}/count_tokens", model="tiny", messages=[{"role": "user", "content": "Hello " * 400}])
    assert found["input_tokens"] > 400


def test_the_ledger_comes_through(server):
    asked = {"return_expert_ledger": True, "model": "tiny"}
    response = {**asked, "input": "Hello", "max_output_tokens": 4}
    events = named_events(server, RESPONSES, **response)
    for found in (server.ok(RESPONSES, **response), events[-1][1]["response"]):
        assert found["manyhands"]["experts"]["distinct"] > 0
    message = {**asked, "messages": SAY, "max_tokens": 4}
    for found in (server.ok(MESSAGES, **message), dict(named_events(server, MESSAGES, **message))["message_delta"]):
        assert found["manyhands"]["experts"]["distinct"] > 0
    assert "manyhands" not in server.ok(MESSAGES, model="tiny", messages=SAY, max_tokens=1)


def test_a_key_is_needed_and_may_come_as_anthropics_clients_send_it(serving):
    with serving(keys=[b"key"], body_bytes=1000) as running:
        asked = {"model": "tiny", "messages": SAY, "max_tokens": 2, "temperature": 0}
        for headers in ({}, {"x-api-key": "other"}):
            for path in (MESSAGES, f"{MESSAGES}/batches"):
                reply = running.client.post(path, json=asked, headers=headers)
                assert reply.status_code == 401 and error_type(reply) == "authentication_error"
        headers = {"x-api-key": "key", "anthropic-version": "2023-06-01"}
        assert running.client.post(f"{MESSAGES}?beta=true", json=asked, headers=headers).status_code == 200
        for path, data, status, kind in (
            (f"{MESSAGES}/batches", b"{}", 404, "not_found_error"),
            (MESSAGES, b"{", 400, "invalid_request_error"),
            (MESSAGES, b"[" * 2000, 413, "request_too_large"),
        ):
            reply = running.client.post(path, content=data, headers=headers)
            assert reply.status_code == status and error_type(reply) == kind, reply.text
        assert error_type(running.client.put(MESSAGES, headers=headers)) == "invalid_request_error"


def error_type(reply):
    found = reply.json()
    assert set(found) == {"type", "error"} and found["type"] == "error"
    assert set(found["error"]) == {"type", "message"} and found["error"]["message"]
    return found["error"]["type"]


LONG = {"model": "tiny", "max_tokens": 150, "ignore_eos": True, "messages": [{"role": "user", "content": "a"}]}


def test_a_server_that_is_full_or_stops_says_so_in_their_form(serving):
    with serving(max_waiting=1, patience=0.0, engine={"max_sequences": 1}) as running:
        slow(running.service, 0.05)
        with futures.ThreadPoolExecutor(3) as pool:
            streams = [pool.submit(named_events, running, MESSAGES, **LONG)]
            until(lambda: running.service.counters.total.made > 0)
            streams.append(pool.submit(running.post, MESSAGES, **LONG))
            until(lambda: running.service.num_open == 2)
            reply = running.post(MESSAGES, **LONG, stream=True)
            assert reply.status_code == 429 and error_type(reply) == "rate_limit_error"
            assert reply.headers["retry-after"]
            running.server.handle_exit(15, None)
            name, last = streams[0].result()[-1]
            assert name == "error" and last["error"]["type"] == "overloaded_error"
            assert streams[1].result().status_code == 529
            assert error_type(streams[1].result()) == "overloaded_error"
        running.thread.join(4)
        assert not running.thread.is_alive()


@pytest.mark.parametrize("begun", [False, True])
def test_what_breaks_is_said_in_their_form(serving, monkeypatch, begun):
    with serving() as running:
        secret = "a very private prompt"

        def broken(*_, **__):
            raise ValueError(secret)

        monkeypatch.setattr("manyhands.serve.chat._Choice.push" if begun else "manyhands.serve.chat.read", broken)
        message = {"model": "tiny", "messages": SAY, "max_tokens": 2}
        reply = running.post(MESSAGES, **message)
        assert reply.status_code == 500 and error_type(reply) == "api_error" and secret not in reply.text
        if begun:
            name, last = named_events(running, MESSAGES, **message)[-1]
            assert name == "error" and last["error"]["type"] == "api_error" and secret not in str(last)
            *_, (error, _), (name, last) = named_events(running, RESPONSES, input="x", max_output_tokens=2)
            assert (error, name) == ("error", "response.failed") and last["response"]["status"] == "failed"
            assert secret not in str(last)
        else:
            assert error_type(running.post(MESSAGES, **message, stream=True)) == "api_error"
        until(lambda: running.service.num_open == 0)


@pytest.mark.parametrize("path", [MESSAGES, RESPONSES])
def test_a_stream_that_is_left_ends(serving, path):
    with serving() as running:
        slow(running.service, 0.02)
        asked = LONG if path == MESSAGES else {"input": "a", "max_output_tokens": 150, "ignore_eos": True}
        with running.client.stream("POST", path, json={**asked, "temperature": 0, "stream": True}) as reply:
            next(reply.iter_raw())
            assert running.service.num_open == 1
        until(lambda: running.service.num_open == 0)
        assert running.service.counters.ended == {"abort": 1}
