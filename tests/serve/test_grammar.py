"""Answers in a form: they are in it, whatever the model would rather say; what is no form is a 400."""

import json
import re
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import pytest
import torch

from manyhands.config import SamplingConfig
from manyhands.engine.engine import Engine
from manyhands.serve import grammar
from manyhands.serve.errors import ApiError
from manyhands.serve.grammar import MOST_DEPTH, read

PET = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "dog"]}, "n": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["kind", "n"],
    "additionalProperties": False,
}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SAY = [{"role": "user", "content": "Hello"}]


def schema_form(schema):
    return {"type": "json_schema", "json_schema": {"name": "it", "strict": True, "schema": schema}}


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_answers_are_in_their_form_each_its_own(model, tokenizer, temperature):
    form = read(tokenizer, json_schema=PET)
    engine = Engine(model, tokenizer)
    how = [SamplingConfig(temperature=temperature, seed=i, max_new_tokens=80) for i in range(5)]
    bound = [engine.add("x", h, constraint=form.new()) for h in how[:4]]
    free = engine.add("x", how[4])
    while engine.busy:
        engine.step()
    for request in bound:
        assert request.finish_reason == "stop"
        jsonschema.validate(json.loads(engine.completion(request).text), PET)
    alone = Engine(model, tokenizer).generate(["x"], how[4])[0]
    assert engine.completion(free).token_ids == alone.token_ids


def test_regular_expressions_and_grammars(model, tokenizer):
    for pattern, how in (
        ("a{3}b+c", {"regex": "a{3}b+c"}),
        ("(on|off)", {"lark": 'start: "on" | "off"'}),
        (r"\{.*", {"json_object": True}),
    ):
        engine = Engine(model, tokenizer)
        request = engine.add("x", SamplingConfig(max_new_tokens=40), constraint=read(tokenizer, **how).new())
        while engine.busy:
            engine.step()
        text = engine.completion(request).text
        assert re.fullmatch(pattern, text, re.DOTALL) or (request.finish_reason == "length" and text), text


def test_a_grammar_is_read_once(tokenizer):
    assert read(tokenizer, regex="ab") is read(tokenizer, regex="ab")
    assert read(tokenizer, regex="ab") is not read(tokenizer, regex="abc")


def test_grammars_are_read_in_many_threads(tokenizer, monkeypatch):
    """More than are kept, so that some are let go while others are counted."""
    monkeypatch.setattr(grammar, "_KEPT", 4)
    patterns = [f"x{i}" for i in range(200)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda pattern: read(tokenizer, regex=pattern), patterns * 2))
    assert all(one.new().allowed().any() for one in found) and len(grammar._kept) == 4


def nested(depth):
    schema = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"json_schema": {"type": "hiccup"}}, "hiccup"),
        ({"json_schema": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"json_schema": {"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}}, "x-guidance"),
        ({"json_schema": {"$ref": "http://elsewhere/x"}}, "elsewhere"),
        ({"json_schema": {"type": "string", "pattern": "("}}, "unclosed"),
        ({"json_schema": [1]}, "object"),
        ({"json_schema": nested(MOST_DEPTH + 1)}, "levels"),
        ({"json_schema": nested(50_000)}, "levels"),
        ({"json_schema": {"enum": ["x" * (1 << 20)]}}, "KiB"),
        ({"json_schema": {"const": float("nan")}}, "JSON"),
        ({"json_schema": {"const": "\ud800"}}, "surrogate"),
        ({"json_schema": {"allOf": [{"pattern": f"(a|b)*a(a|b){{{i}}}$"} for i in range(28)]}}, "allOf"),
        ({"json_schema": {"$defs": {str(i): {"format": "date"} for i in range(9)}, "allOf": []}}, "allOf"),
        ({"lark": "start: " + " & ".join(["/a+/"] * 10)}, "&"),
        ({"regex": "("}, "unclosed"),
        ({"regex": "a" * (1 << 16) + "b"}, "KiB"),
        ({"regex": "\udfff"}, "surrogate"),
        ({"lark": "start: nowhere"}, "nowhere"),
    ],
)
def test_what_is_no_form_is_refused_with_its_name(tokenizer, how, said):
    with pytest.raises(ApiError, match=said) as caught:
        read(tokenizer, **how)
    assert caught.value.status == 400 and caught.value.param == "response_format"


def test_a_vocabulary_of_another_size(tokenizer):
    """The model's is larger here; a mask is the tokenizer's."""
    mask = read(tokenizer, regex="a+").new().allowed()
    assert mask.dtype == torch.bool and mask[tokenizer.encode("a")[0]] and not mask[tokenizer.encode("b")[0]]


@pytest.mark.parametrize("schema", [{"$ref": "#"}, {"anyOf": [{"$ref": "#"}]}])
def test_a_grammar_that_met_a_limit_is_an_error_and_no_finished_answer(model, tokenizer, schema):
    engine = Engine(model, tokenizer)
    request = engine.add("x", SamplingConfig(max_new_tokens=9), constraint=read(tokenizer, json_schema=schema).new())
    while engine.busy:
        engine.step()
    assert request.finish_reason not in ("stop", "length")


def test_chat_in_the_form_of_a_schema(server):
    reply = server.ok(CHAT, messages=SAY, max_tokens=100, n=2, temperature=1, response_format=schema_form(PET))
    for choice in reply["choices"]:
        assert choice["finish_reason"] == "stop"
        jsonschema.validate(json.loads(choice["message"]["content"]), PET)
    events = server.events(CHAT, messages=SAY, max_tokens=100, response_format=schema_form(PET))
    text = "".join(e["choices"][0]["delta"].get("content") or "" for e in events[:-1] if e["choices"])
    jsonschema.validate(json.loads(text), PET)
    reply = server.ok(CHAT, messages=SAY, max_tokens=100, response_format={"type": "json_object"})
    assert reply["choices"][0]["message"]["content"].startswith("{")


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"guided_choice": ["yes", "n(o"]}, r"yes|n\(o"),
        ({"guided_regex": "[ab]{4}"}, "[ab]{4}"),
        ({"guided_json": {"type": "boolean"}}, "true|false"),
        ({"structured_outputs": {"choice": ["left", "right"]}}, "left|right"),
        ({"structured_outputs": {"grammar": 'start: "x" /[0-9]/'}}, "x[0-9]"),
        ({"response_format": schema_form({"const": [1]})}, r"\[1\]"),
    ],
)
def test_completions_in_a_form(server, form, pattern):
    for path, asked in ((COMPLETIONS, {"prompt": "x"}), (CHAT, {"messages": SAY})):
        choice = server.ok(path, max_tokens=30, **asked, **form)["choices"][0]
        assert re.fullmatch(pattern, choice["text"] if "text" in choice else choice["message"]["content"])


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": None}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
        ),
        ({"response_format": schema_form({"type": "hiccup"})}, "response_format.json_schema.schema"),
        ({"response_format": "json"}, "response_format"),
        ({"guided_regex": 5}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": [""]}, "guided_choice"),
        ({"guided_json": {}, "guided_regex": "a"}, "guided_regex"),
        ({"structured_outputs": {"telepathy": 1}}, "structured_outputs.telepathy"),
    ],
)
def test_what_is_no_form_is_a_400(server, form, param):
    for path, asked in ((COMPLETIONS, {"prompt": "x"}), (CHAT, {"messages": SAY})):
        assert server.bad(path, **asked, **form)["param"] == param
