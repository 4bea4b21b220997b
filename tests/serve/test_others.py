"""/v1/responses and /v1/messages over HTTP: what chat says, in their own forms; errors too."""

import json

import pytest

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
    (first, *_) = server.ok("/tokenize", prompt=words, add_special_tokens=False)["tokens"]
    events = server.events(CHAT, stop_token_ids=[first], **asked)[:-1]
    ended = [c for e in events for c in e["choices"] if c["finish_reason"]]
    assert ended[0]["stop_reason"] in (first, None)


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
