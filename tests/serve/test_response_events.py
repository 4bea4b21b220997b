"""Replies of the chat core as /v1/responses gives them: whole and while they are made."""

import asyncio
import json

import pytest

from manyhands.serve.errors import ApiError
from manyhands.serve.response_events import events, response
from tests.serve.chunks import HEAD, call, choice, completion, logprob, run, source, stream

BODY = {"model": "m", "input": "hi", "metadata": {"a": "b"}, "top_logprobs": 1}
EVERYTHING = [
    {"reasoning_content": "h"},
    ({"reasoning_content": "m"}, [logprob("m")]),
    ({}, [logprob("Lo")]),
    ({"content": "Look"}, [logprob("ok")]),
    {"content": "."},
    {"tool_calls": [call(0, "weather", id="c0")]},
    {"tool_calls": [call(0, arguments='{"city":')]},
    {"tool_calls": [call(0, arguments='"Bern"}')]},
    {"tool_calls": [call(1, "time", "{}", id="c1")]},
]


def test_every_kind_of_item_in_its_order():
    made = run(events(BODY, source(stream(*EVERYTHING, finish="tool_calls"))))
    assert [event["sequence_number"] for event in made] == list(range(len(made)))
    part = ["content_part.added", *["reasoning_text.delta"] * 2, "reasoning_text.done", "content_part.done"]
    words = ["content_part.added", *["output_text.delta"] * 2, "output_text.done", "content_part.done"]
    arguments = "function_call_arguments"
    assert [event["type"].removeprefix("response.") for event in made] == [
        "created",
        "in_progress",
        *("output_item.added", *part, "output_item.done"),
        *("output_item.added", *words, "output_item.done"),
        *("output_item.added", *[f"{arguments}.delta"] * 2, f"{arguments}.done", "output_item.done"),
        *("output_item.added", f"{arguments}.delta", f"{arguments}.done", "output_item.done"),
        "completed",
    ]
    begun = [event["part"] for event in made if event["type"] == "response.content_part.added"]
    assert not any(part["text"] or part.get("logprobs") for part in begun)
    whole = made[-1]["response"]
    assert [item["type"] for item in whole["output"]] == ["reasoning", "message", "function_call", "function_call"]
    assert [event["item"] for event in made if event["type"].endswith("item.done")] == whole["output"]
    assert len({item["id"] for item in whole["output"]}) == 4
    assert whole["output"][2] == {
        "id": whole["output"][2]["id"],
        "type": "function_call",
        "status": "completed",
        "call_id": "c0",
        "name": "weather",
        "arguments": '{"city":"Bern"}',
    }
    assert [one["token"] for one in whole["output"][1]["content"][0]["logprobs"]] == ["Lo", "ok"]
    assert whole["usage"]["input_tokens_details"]["cached_tokens"] == 4
    assert (whole["usage"]["input_tokens"], whole["usage"]["total_tokens"]) == (9, 14)
    assert whole["metadata"] == {"a": "b"} and whole["id"] == "resp_7"


def test_events_are_snapshots_that_later_ones_do_not_change():
    live = []

    async def read():
        async for event in events(BODY, source(stream(*EVERYTHING))):
            live.append((event, json.dumps(event)))

    asyncio.run(read())
    assert all(json.dumps(event) == text for event, text in live)


def test_whole_equals_streamed():
    calls = [{"id": f"c{at}", "type": "function", "function": f} for at, f in enumerate([
        {"name": "weather", "arguments": '{"city":"Bern"}'}, {"name": "time", "arguments": "{}"}])]  # fmt: skip
    entries = [logprob(token) for token in ("hm", "Lo", "ok", ".", "<call>")]
    reply = completion("tool_calls", {"content": entries}, reasoning_content="hm", content="Look.", tool_calls=calls)
    one, other = response(BODY, reply), run(events(BODY, source(stream(*EVERYTHING))))[-1]["response"]
    assert [e["token"] for e in one["output"][1]["content"][0].pop("logprobs")] == ["Lo", "ok", "."]
    other["output"][1]["content"][0].pop("logprobs")
    one.pop("completed_at"), other.pop("completed_at")
    assert one == other


def test_a_cut_reply_is_incomplete():
    made = run(events(BODY, source(stream({"content": "a"}, finish="length"))))
    assert made[-1]["type"] == "response.incomplete"
    whole = made[-1]["response"]
    assert whole["status"] == whole["output"][0]["status"] == "incomplete"
    assert whole["incomplete_details"] == {"reason": "max_output_tokens"}


def test_an_empty_reply_has_an_empty_message():
    assert response(BODY, completion(content=""))["output"][0]["content"][0]["text"] == ""
    made = run(events(BODY, source(stream())))
    assert made[-1]["response"]["output"] == [e["item"] for e in made if e["type"].endswith("item.done")]


@pytest.mark.parametrize("way", ["raised", "sent"])
def test_an_error_in_mid_stream_is_an_event(way):
    chunks = stream({"content": "a"})[:2]
    error = ApiError(500, "the engine stopped", "server_error")
    feed = source(chunks, error) if way == "raised" else source([*chunks, error.body()])
    made = run(events(BODY, feed))
    assert [event["type"] for event in made[-2:]] == ["error", "response.failed"]
    assert made[-2]["message"] == made[-1]["response"]["error"]["message"] == "the engine stopped"
    assert made[-1]["response"]["status"] == "failed"
    assert [event["sequence_number"] for event in made] == list(range(len(made)))


def test_an_error_before_the_first_chunk_is_raised():
    with pytest.raises(ApiError, match="too long"):
        run(events(BODY, source([], ApiError(400, "too long"))))


def test_created_comes_with_the_first_chunk():
    made = run(events(BODY, source([choice({"role": "assistant"})])))
    assert made[0]["type"] == "response.created" and made[0]["response"]["model"] == HEAD["model"]
    assert made[0]["response"]["output"] == [] and made[0]["response"]["usage"] is None
