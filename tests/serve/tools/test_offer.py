"""Tools over HTTP: forced calls hold to their schemas, free ones are found, no tools are 400s with their place."""

import json

import jsonschema
import pytest

from manyhands.serve.errors import ApiError
from manyhands.serve.tools.offer import offer_of

CHAT = "/v1/chat/completions"
SAY = [{"role": "user", "content": "Hello"}]
KIND = {"enum": ["cat", "dog"]}
PET = {
    "type": "object",
    "properties": {"kind": {"$ref": "#/$defs/kind"}, "n": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["kind", "n"],
    "additionalProperties": False,
    "$defs": {"kind": KIND},
}
PLACE = {
    "type": "object",
    "properties": {"kind": {"$ref": "#/definitions/kind"}},
    "required": ["kind"],
    "additionalProperties": False,
    "definitions": {"kind": {"const": "home"}},
}


@pytest.fixture(scope="module")
def server(serving):
    """Its template tells the model nothing of tools: a schema would fill its context."""
    with serving(template="{% for m in messages %}{{ m.content }}{% endfor %}") as running:
        yield running


def tool(name="get_pet", parameters=PET):
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def named(name):
    return {"type": "function", "function": {"name": name}}


def test_a_named_function_is_called(server):
    asked = {"messages": SAY, "max_tokens": 100, "tools": [tool()], "tool_choice": named("get_pet")}
    choice = server.ok(CHAT, **asked)["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    assert call["type"] == "function" and call["function"]["name"] == "get_pet" and call["id"]
    jsonschema.validate(json.loads(call["function"]["arguments"]), PET)
    events = server.events(CHAT, **asked)[:-1]
    deltas = [c for e in events for c in e["choices"][0]["delta"].get("tool_calls", ())]
    assert deltas[0]["function"]["name"] == "get_pet" and deltas[0]["id"]
    assert "".join(d["function"].get("arguments") or "" for d in deltas) == call["function"]["arguments"]
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("parallel", [True, False])
def test_some_function_is_called(server, parallel):
    tools = [tool(), tool("go", PLACE), tool("now", None)]
    asked = {"messages": SAY, "max_tokens": 150, "tools": tools, "tool_choice": "required", "temperature": 1}
    for seed in range(3):
        choice = server.ok(CHAT, seed=seed, parallel_tool_calls=parallel, **asked)["choices"][0]
        calls = choice["message"].get("tool_calls")
        if choice["finish_reason"] == "length":
            continue
        assert choice["finish_reason"] == "tool_calls" and 1 <= len(calls) <= (8 if parallel else 1)
        for call in calls:
            schema = {"get_pet": PET, "go": PLACE, "now": {"type": "object"}}[call["function"]["name"]]
            jsonschema.validate(json.loads(call["function"]["arguments"]), schema)


def test_free_answers_and_none(server):
    for choice in ("auto", "none", None):
        reply = server.ok(CHAT, messages=SAY, max_tokens=8, tools=[tool()], tool_choice=choice)
        assert isinstance(reply["choices"][0]["message"]["content"], str)


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"tools": [5]}, "tools[0]"),
        ({"tools": [{}]}, "tools[0].function"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [tool(), tool()]}, "tools[1].function.name"),
        ({"tools": [tool(parameters=[1])]}, "tools[0].function.parameters"),
        ({"tools": [tool(parameters={"type": "array"})]}, "tools[0].function.parameters.type"),
        ({"tools": [tool(parameters={"type": {"a": 1}})]}, "tools[0].function.parameters.type"),
        ({"tools": "x"}, "tools"),
        ({"tools": [tool(str(i)) for i in range(129)]}, "tools"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [tool()], "tool_choice": "always"}, "tool_choice"),
        ({"tools": [tool()], "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tools": [tool()], "tool_choice": named("other")}, "tool_choice.function.name"),
        (
            {"tools": [tool(parameters={"type": "object", "uniqueItems": True})], "tool_choice": named("get_pet")},
            "tools[0].function.parameters",
        ),
    ],
)
def test_what_is_no_tool_is_refused_with_its_place(server, asked, param):
    assert server.bad(CHAT, messages=SAY, **asked)["param"] == param


def test_schemas_that_nest_without_end_are_refused():
    schema = {}
    for _ in range(5000):
        schema = {"items": schema}
    with pytest.raises(ApiError, match="levels"):
        offer_of([tool(parameters={"type": "object", "properties": {"a": schema}})], None, None)
