"""A request of /v1/messages as a chat request: what is translated, and what is refused by name. Errors in its shape."""

import pytest

from manyhands.serve.errors import ApiError
from manyhands.serve.messages import chat_body, counted_body, error

TOOL = {"name": "weather", "description": "of a city", "input_schema": {"type": "object"}}
USER = {"role": "user", "content": "hi"}


def ask(**fields):
    return chat_body({"model": "m", "max_tokens": 5, "messages": [USER], **fields})


def test_text_with_settings():
    settings = {"temperature": 0.3, "top_k": 4, "top_p": 0.8, "stop_sequences": ["x"], "metadata": {"user_id": "u"}}
    system = [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "b"}]
    assert ask(system=system, **settings, seed=1, unknown=2) == {
        "model": "m",
        "max_completion_tokens": 5,
        "messages": [{"role": "system", "content": "a\n\nb"}, USER],
        "temperature": 0.3,
        "top_k": 4,
        "top_p": 0.8,
        "stop": ["x"],
        "user": "u",
        "seed": 1,
    }


def test_calls_and_results():
    said = [
        {"type": "thinking", "thinking": "hm", "signature": "s"},
        {"type": "redacted_thinking", "data": "?"},
        {"type": "text", "text": "let me see"},
        {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Zürich"}},
    ]
    results = [
        {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "rain"}]},
        {"type": "tool_result", "tool_use_id": "t2", "content": "no such city", "is_error": True},
        {"type": "tool_result", "tool_use_id": "t3"},
        {"type": "text", "text": "so"},
        {"type": "text", "text": "?"},
    ]
    function = {"name": "weather", "arguments": '{"city": "Zürich"}'}
    both = [USER, {"role": "assistant", "content": said}, {"role": "user", "content": results}]
    assert ask(messages=both)["messages"][1:] == [
        {
            "role": "assistant",
            "content": "let me see",
            "reasoning_content": "hm",
            "tool_calls": [{"id": "t1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "t1", "content": "rain"},
        {"role": "tool", "tool_call_id": "t2", "content": "Error: no such city"},
        {"role": "tool", "tool_call_id": "t3", "content": ""},
        {"role": "user", "content": "so?"},
    ]


def test_a_last_message_of_the_assistant_is_continued():
    begun = ask(messages=[USER, {"role": "assistant", "content": "Once"}])
    assert begun["continue_final_message"] is True and begun["add_generation_prompt"] is False
    empty = ask(messages=[USER, {"role": "assistant", "content": []}])
    assert empty["messages"] == [USER] and "continue_final_message" not in empty


def test_tools_and_their_choice():
    function = {"name": "weather", "description": "of a city", "parameters": {"type": "object"}}
    assert ask(tools=[TOOL])["tools"] == [{"type": "function", "function": function}]
    for kind, chat in (("auto", "auto"), ("any", "required"), ("none", "none")):
        assert ask(tools=[TOOL], tool_choice={"type": kind})["tool_choice"] == chat
    named = ask(tools=[TOOL], tool_choice={"type": "tool", "name": "weather", "disable_parallel_tool_use": True})
    assert named["tool_choice"] == {"type": "function", "function": {"name": "weather"}}
    assert named["parallel_tool_calls"] is False


def test_thinking_and_format():
    assert ask(thinking={"type": "disabled"})["chat_template_kwargs"] == {"enable_thinking": False}
    on = ask(thinking={"type": "enabled", "budget_tokens": 9}, chat_template_kwargs={"x": 1})
    assert on["chat_template_kwargs"] == {"enable_thinking": True, "x": 1}
    wanted = {"format": {"type": "json_schema", "schema": {"type": "object"}}}
    assert ask(output_config=wanted)["response_format"]["json_schema"]["schema"] == {"type": "object"}


def test_counting_needs_no_max_tokens():
    assert counted_body({"model": "m", "messages": [USER]}) == {"model": "m", "messages": [USER]}


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"model": None}, "model"),
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "9"}, "max_tokens"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [7]}, "messages[0]"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": {}}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "messages[0].content[0].tool_use_id"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use"}]}]}, "messages[0].content[0].input"),
        ({"system": 5}, "system"),
        ({"system": [{"type": "image"}]}, "system[0].type"),
        ({"temperature": 1.5}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"stop_sequences": "x"}, "stop_sequences"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"metadata": []}, "metadata"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tools": [TOOL], "tool_choice": "auto"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "some"}}, "tool_choice.type"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "f"}}, "tool_choice.name"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"thinking": {"type": "maybe"}}, "thinking.type"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type"),
        ({"stream": "yes"}, "stream"),
    ],
)
def test_what_is_wrong_is_named(fields, place):
    with pytest.raises(ApiError) as problem:
        ask(**fields)
    assert (problem.value.status, problem.value.param) == (400, place)


@pytest.mark.parametrize(
    ("status", "sent", "kind"),
    [
        (400, 400, "invalid_request_error"),
        (401, 401, "authentication_error"),
        (404, 404, "not_found_error"),
        (405, 405, "invalid_request_error"),
        (413, 413, "request_too_large"),
        (429, 429, "rate_limit_error"),
        (500, 500, "api_error"),
        (503, 529, "overloaded_error"),
    ],
)
def test_errors_have_its_shape_and_types(status, sent, kind):
    body = {"type": "error", "error": {"type": kind, "message": "no"}}
    assert error(ApiError(status, "no")) == (sent, body)
