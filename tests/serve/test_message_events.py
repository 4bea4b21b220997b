"""Replies of the chat core as /v1/messages gives them: whole and while they are made."""

import json

import pytest

from manyhands.serve.errors import ApiError
from manyhands.serve.message_events import events, message
from tests.serve.chunks import USAGE, call, completion, run, source, stream

BODY = {"model": "m", "max_tokens": 5, "messages": [], "stop_sequences": ["END"]}
EVERYTHING = [
    {"reasoning_content": "h"},
    {"reasoning_content": "m"},
    {"content": "Look"},
    {"content": "."},
    {"tool_calls": [call(0, "weather", id="c0")]},
    {"tool_calls": [call(0, arguments='{"city":')]},
    {"tool_calls": [call(0, arguments='"Bern"}')]},
    {"tool_calls": [call(1, "time", "{}", id="c1")]},
]


def assembled(made):
    """The message that a client puts together from the events."""
    whole = made[0]["message"]
    blocks, texts = whole["content"], {}
    for event in made[1:]:
        if event["type"] == "content_block_start":
            assert event["index"] == len(blocks)
            blocks.append(dict(event["content_block"]))
        elif event["type"] == "content_block_delta":
            delta = dict(event["delta"])
            kind = delta.pop("type")
            ((field, piece),) = delta.items()
            if kind == "input_json_delta":
                texts[event["index"]] = texts.get(event["index"], "") + piece
            else:
                blocks[event["index"]][field] += piece
        elif event["type"] == "message_delta":
            whole |= event["delta"] | {"usage": event["usage"]}
    for at, text in texts.items():
        blocks[at]["input"] = json.loads(text)
    return whole


def test_every_kind_of_block_and_whole_equals_streamed():
    made = run(events(BODY, source(stream(*EVERYTHING, finish="tool_calls"))))
    kinds = [event["type"] for event in made]
    assert kinds[:2] == ["message_start", "ping"] and kinds[-2:] == ["message_delta", "message_stop"]
    calls = [{"id": f"c{at}", "type": "function", "function": f} for at, f in enumerate([
        {"name": "weather", "arguments": '{"city":"Bern"}'}, {"name": "time", "arguments": "{}"}])]  # fmt: skip
    whole = message(BODY, completion("tool_calls", reasoning_content="hm", content="Look.", tool_calls=calls))
    assert assembled(made) == whole
    thinking, text, first, second = whole["content"]
    assert thinking["thinking"] == "hm" and thinking["signature"]
    assert text == {"type": "text", "text": "Look."}
    assert first == {"type": "tool_use", "id": "c0", "name": "weather", "input": {"city": "Bern"}}
    assert second["input"] == {} and whole["stop_reason"] == "tool_use"


def test_cached_tokens_are_not_input_tokens():
    usage = message(BODY, completion(content="a"))["usage"]
    assert (usage["input_tokens"], usage["cache_read_input_tokens"], usage["output_tokens"]) == (5, 4, 5)


@pytest.mark.parametrize(
    ("finish", "stop", "used", "reason", "sequence"),
    [
        ("stop", None, 2, "end_turn", None),
        ("stop", "END", 2, "stop_sequence", "END"),
        ("stop", 7, 2, "end_turn", None),
        ("stop", "of the server", 2, "end_turn", None),
        ("length", None, 5, "max_tokens", None),
        ("length", None, 2, "model_context_window_exceeded", None),
    ],
)
def test_why_it_ended(finish, stop, used, reason, sequence):
    usage = USAGE | {"completion_tokens": used}
    whole = message(BODY, completion(finish, content="a", stop_reason=stop, usage=usage))
    made = run(events(BODY, source(stream({"content": "a"}, finish=finish, stop_reason=stop, usage=usage))))
    assert (whole["stop_reason"], whole["stop_sequence"]) == (reason, sequence)
    assert made[-2]["delta"] == {"stop_reason": reason, "stop_sequence": sequence}


def test_an_empty_reply_has_an_empty_text():
    assert message(BODY, completion(content=None))["content"] == [{"type": "text", "text": ""}]
    assert assembled(run(events(BODY, source(stream()))))["content"] == [{"type": "text", "text": ""}]


def test_arguments_cut_in_the_middle_are_no_input():
    cut = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": [1'}}
    whole = message(BODY, completion("length", tool_calls=[cut]))
    assert whole["content"][0]["input"] == {} and whole["stop_reason"] == "max_tokens"


@pytest.mark.parametrize("way", ["raised", "sent"])
def test_an_error_in_mid_stream_is_an_event(way):
    chunks, error = stream({"content": "a"})[:2], ApiError(500, "the engine stopped", "server_error")
    made = run(events(BODY, source(chunks, error) if way == "raised" else source([*chunks, error.body()])))
    assert made[-1] == {"type": "error", "error": {"type": "api_error", "message": "the engine stopped"}}


def test_an_error_before_the_first_chunk_is_raised():
    with pytest.raises(ApiError, match="too long"):
        run(events(BODY, source([], ApiError(400, "too long"))))
