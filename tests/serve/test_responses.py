"""A request of /v1/responses as a chat request: what is translated, and what is refused by name."""

import pytest

from manyhands.serve.errors import ApiError
from manyhands.serve.responses import chat_body

TOOL = {"type": "function", "name": "weather", "description": "of a city", "parameters": {"type": "object"}}
CHAT_TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "of a city", "parameters": {"type": "object"}},
}
TIME = {"type": "function", "name": "time"}


def ask(**fields):
    return chat_body({"model": "m", "input": "hi", **fields})


def test_a_string_with_settings():
    body = ask(instructions="be brief", max_output_tokens=7, temperature=0.5, top_p=0.9, seed=3, store=True, foo=1)
    assert body == {
        "model": "m",
        "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}],
        "max_completion_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 3,
    }


def test_one_turn_of_the_model_is_one_message():
    items = [
        {"role": "developer", "content": "rules"},
        {"role": "user", "content": [{"type": "input_text", "text": "weather "}, {"type": "input_text", "text": "?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "let me see"}]},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"},
        {"type": "function_call", "call_id": "c2", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "rain"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "sun"}]},
    ]
    function = {"name": "weather", "arguments": "{}"}
    assert ask(input=items, instructions="first")["messages"] == [
        {"role": "system", "content": "first\n\nrules"},
        {"role": "user", "content": "weather ?"},
        {
            "role": "assistant",
            "content": "let me see",
            "reasoning_content": "hm",
            "tool_calls": [{"id": id, "type": "function", "function": function} for id in ("c1", "c2")],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        {"role": "tool", "tool_call_id": "c2", "content": "sun"},
    ]


def test_tools_and_their_choice():
    assert ask(tools=[TOOL])["tools"] == [CHAT_TOOL]
    assert ask(tools=[TOOL], tool_choice="required")["tool_choice"] == "required"
    named = ask(tools=[TOOL], tool_choice={"type": "function", "name": "weather"})["tool_choice"]
    assert named == {"type": "function", "function": {"name": "weather"}}
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "weather"}]}
    body = ask(tools=[TIME, TOOL], tool_choice=allowed)
    assert body["tools"] == [CHAT_TOOL] and body["tool_choice"] == "required"
    assert "tool_choice" not in ask(tool_choice="auto") and "tool_choice" not in ask(tool_choice="none", tools=[])


def test_formats_logprobs_effort_stream():
    schema = {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}
    assert ask(text={"format": schema})["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "n", "schema": {"type": "object"}, "strict": True},
    }
    assert ask(text={"format": {"type": "json_object"}})["response_format"] == {"type": "json_object"}
    assert ask(top_logprobs=2)["top_logprobs"] == 2
    assert ask(include=["message.output_text.logprobs"])["logprobs"] is True
    assert ask(reasoning={"effort": "low", "summary": None})["reasoning_effort"] == "low"
    assert ask(stream=True)["stream_options"] == {"include_usage": True}
    assert ask(stream=None, tools=None, text=None, include=None, reasoning=None) == ask()


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 3}, "input"),
        ({"input": ["x"]}, "input[0]"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": {}}]}, "input[0].arguments"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
        ({"input": [{"type": "computer_call"}]}, "input[0].type"),
        ({"input": [{"type": []}]}, "input[0].type"),
        ({"instructions": 4}, "instructions"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": {"id": "c"}}, "conversation"),
        ({"background": True}, "background"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": True}, "max_output_tokens"),
        ({"max_output_tokens": 2.0}, "max_output_tokens"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"stream": 1}, "stream"),
        ({"truncation": "some"}, "truncation"),
        ({"tools": {}}, "tools"),
        ({"tools": 7}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "other"}}, "tool_choice.name"),
        ({"tools": [TOOL], "tool_choice": {"type": "file_search"}}, "tool_choice.type"),
        ({"text": {"format": {"type": "yaml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
        ({"text": "json"}, "text"),
        ({"reasoning": {"effort": 3}}, "reasoning.effort"),
    ],
)
def test_what_is_wrong_is_named(fields, place):
    with pytest.raises(ApiError) as error:
        ask(**fields)
    assert (error.value.status, error.value.param) == (400, place)
    assert place.split(".")[0] in str(error.value)
