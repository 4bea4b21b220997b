"""Calls as each family writes them: whole, in pieces of any size, several, with words around; and what is no call."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyhands.serve.tools.formats import format_of
from manyhands.serve.tools.parser import parser_of

SCHEMAS = {
    "get_pet": {
        "type": "object",
        "properties": {
            "kind": {"type": "string"},
            "n": {"type": "integer"},
            "wild": {"type": "boolean"},
            "tags": {"type": "array"},
            "size": {"type": ["number", "null"]},
        },
    },
    "now": {"type": "object", "properties": {}},
}
PET = {"kind": "cat", "n": 3}
CALLS = [("get_pet", PET)]
TWO = [("get_pet", PET), ("now", {})]
DEEP = "<｜tool▁calls▁begin｜>{}<｜tool▁calls▁end｜>"
KIMI = "<|tool_calls_section_begin|>{}<|tool_calls_section_end|>"

CASES = {
    "hermes": (
        "<tool_call>",
        'Yes.\n<tool_call>\n{"name": "get_pet", "arguments": {"kind": "cat", "n": 3}}\n</tool_call>',
    ),
    "glm": (
        "<tool_call> <arg_key>",
        "<tool_call>get_pet\n<arg_key>kind</arg_key>\n<arg_value>cat</arg_value>\n<arg_key>n</arg_key>\n"
        "<arg_value>3</arg_value>\n</tool_call>",
    ),
    "coder": (
        "<function= <parameter= <tool_call>",
        "<tool_call>\n<function=get_pet>\n<parameter=kind>\ncat\n</parameter>\n<parameter=n>\n3\n</parameter>\n</function>\n"
        "</tool_call>",
    ),
    "coder without its tag": (
        "<function= <parameter=",
        "<function=get_pet><parameter=kind>cat</parameter><parameter=n>3</parameter></function>",
    ),
    "mistral": ("[TOOL_CALLS]", '[TOOL_CALLS] [{"name": "get_pet", "arguments": {"kind": "cat", "n": 3}}]'),
    "mistral v11": ("[TOOL_CALLS]", '[TOOL_CALLS]get_pet[ARGS]{"kind": "cat", "n": 3}'),
    "deepseek v3": (
        DEEP,
        DEEP.format(
            "<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_pet\n```json\n"
            '{"kind": "cat", "n": 3}\n```<｜tool▁call▁end｜>'
        ),
    ),
    "deepseek v3.1": (
        DEEP,
        DEEP.format('<｜tool▁call▁begin｜>get_pet<｜tool▁sep｜>{"kind": "cat", "n": 3}<｜tool▁call▁end｜>'),
    ),
    "kimi": (
        KIMI,
        KIMI.format(
            '<|tool_call_begin|>functions.get_pet:0<|tool_call_argument_begin|>{"kind": "cat", "n": 3}<|tool_call_end|>'
        ),
    ),
    "minimax": (
        "<minimax:tool_call>",
        '<minimax:tool_call>\n<invoke name="get_pet">\n<parameter name="kind">cat</parameter>\n'
        '<parameter name="n">3</parameter>\n</invoke>\n</minimax:tool_call>',
    ),
    "llama": ("Environment: ipython", '{"name": "get_pet", "parameters": {"kind": "cat", "n": 3}}'),
    "llama with a tag": ("<|python_tag|>", '<|python_tag|>{"name": "get_pet", "parameters": {"kind": "cat", "n": 3}}'),
    "harmony": (
        "<|channel|><|message|>",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.get_pet "
        '<|constrain|>json<|message|>{"kind": "cat", "n": 3}<|call|>',
    ),
    "two of hermes": (
        "<tool_call>",
        '<tool_call>{"name": "get_pet", "arguments": {"kind": "cat", "n": 3}}</tool_call>\n'
        '<tool_call>{"name": "now", "arguments": {}}</tool_call>\n',
    ),
    "two of mistral": ("[TOOL_CALLS]", '[TOOL_CALLS]get_pet[ARGS]{"kind": "cat", "n": 3}[TOOL_CALLS]now[ARGS]{}'),
    "two of llama": ("<|python_tag|>", '{"name": "get_pet", "parameters": {"kind": "cat", "n": 3}}; {"name": "now"}'),
}


def read(template, pieces, prompt_end="", schemas=SCHEMAS):
    parser = parser_of(template, prompt_end, schemas)
    said, thought, calls = "", "", []
    for delta in [d for piece in pieces for d in parser.feed(piece)] + parser.finish():
        assert len(delta) == 1
        said += delta.get("content") or ""
        thought += delta.get("reasoning_content") or ""
        for call in delta.get("tool_calls", ()):
            if call["index"] == len(calls):
                assert call["id"] and call["type"] == "function"
                calls.append([call["id"], call["function"]["name"], ""])
            calls[call["index"]][2] += call["function"].get("arguments") or ""
    return said, thought, calls


def named(calls):
    return [(name, json.loads(arguments)) for _, name, arguments in calls]


@pytest.mark.parametrize("case", CASES)
def test_a_call_is_read(case):
    template, text = CASES[case]
    said, thought, calls = read(template, [text])
    assert named(calls) == (TWO if case.startswith("two") else CALLS)
    assert said == ("Yes.\n" if case == "hermes" else "") and thought == ("Hm." if case == "harmony" else "")
    assert len({id for id, _, _ in calls}) == len(calls)


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_pieces_of_any_size_say_the_same(case, data):
    template, text = CASES[case]
    text = data.draw(st.sampled_from([text, text[: len(text) // 2], "Well, " + text, text + "\n\nSo.", "< " + text]))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole, cut, single = (read(template, how) for how in ([text], pieces, list(text)))
    for other in (cut, single):
        assert other[:2] == whole[:2] and [c[1:] for c in other[2]] == [c[1:] for c in whole[2]]


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>{broken</tool_call>",
        "<tool_call>[1]</tool_call>",
        '<tool_call>{"name": 5}</tool_call>',
        '<tool_call>{"name": "get_pet", "arguments": [1]}</tool_call>',
        "<tool_call>two words</tool_call>",
        "<tool_call>",
        "<tool_call",
        "a < b",
    ],
)
def test_what_is_no_call_is_said_as_it_stands(text):
    assert read("<tool_call>", list(text)) == (text, "", [])


def test_llamas_json_is_a_call_only_of_what_was_offered():
    text = '{"name": "unknown", "parameters": {}}'
    assert read("<|python_tag|>", list(text)) == (text, "", [])
    assert read("<|python_tag|>", ["[1, 2]"]) == ("[1, 2]", "", [])


def test_arguments_have_their_schemas_types():
    pairs = {"kind": "7", "n": "7", "wild": "True", "tags": '["a", 1]', "size": "null", "other": "7"}
    inner = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in pairs.items())
    _, _, calls = read("<function= <parameter=", [f"<tool_call><function=get_pet>{inner}</function></tool_call>"])
    expected = {"kind": "7", "n": 7, "wild": True, "tags": ["a", 1], "size": None, "other": 7}
    assert named(calls) == [("get_pet", expected)]


def test_kimis_ids_are_its_own():
    assert read(*[KIMI, [CASES["kimi"][1]]])[2][0][0] == "functions.get_pet:0"


def test_thoughts_are_apart_and_hold_no_calls():
    template = "<tool_call> </think>"
    text = '<think>Call <tool_call>?</think>\n\nYes <tool_call>{"name": "now", "arguments": {}}</tool_call>'
    said, thought, calls = read(template, list(text))
    assert (said, thought, named(calls)) == ("Yes ", "Call <tool_call>?", [("now", {})])
    assert read(template, ["so</think>A"], "<think>\n")[:2] == ("A", "so")


def test_without_tools_nothing_is_a_call():
    text = CASES["hermes"][1]
    assert read("<tool_call>", [text], schemas=None) == (text, "", [])


def test_formats_are_found_in_templates():
    names = {case: format_of(template).name for case, (template, _) in CASES.items()}
    assert names["hermes"] == names["glm"] == "tagged" and names["llama"] == names["llama with a tag"] == "llama"
    assert names["harmony"] == "harmony" and format_of("").name == "tagged"
