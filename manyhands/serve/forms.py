"""The form a request wants its answer in: OpenAI's `response_format`, vLLM's `structured_outputs` and `guided_…`."""

import re
from collections.abc import Mapping
from typing import Any

from manyhands.config.base import short_repr
from manyhands.serve.errors import wrong
from manyhands.serve.grammar import Grammar, compiled
from manyhands.serve.protocol import Generating
from manyhands.text import Tokenizer

_GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_grammar": "grammar",
    "guided_choice": "choice",
    "guided_json_object": "json_object",
}
_KINDS = tuple(_GUIDED.values())


async def form_of(tokenizer: Tokenizer, request: Generating) -> Grammar | None:
    """None: any text. Raises `ApiError` 400 that names the field, and the keyword that is not served."""
    found = [(param, kind, value) for param, kind, value in _asked(request) if value is not False]
    if not found:
        return None
    if len(found) > 1:
        raise wrong(found[1][0], f"not together with {found[0][0]}")
    param, kind, value = found[0]
    if kind == "json_object":
        return await compiled(tokenizer, json_object=True, param=param)
    if kind == "json":
        return await compiled(tokenizer, json_schema=value, param=param)
    if kind == "choice":
        texts = value if isinstance(value, list) else []
        if not texts or not all(isinstance(text, str) and text for text in texts):
            raise wrong(param, "expected a list of texts that are not empty")
        return await compiled(tokenizer, regex="|".join(map(re.escape, texts)), param=param)
    if not isinstance(value, str) or not value:
        raise wrong(param, f"expected a text, found {short_repr(value)}")
    if kind == "regex":
        return await compiled(tokenizer, regex=value, param=param)
    return await compiled(tokenizer, lark=value, param=param)


def _asked(request: Generating) -> list[tuple[str, str, Any]]:
    """Field, kind and value of every form that is asked for."""
    found: list[tuple[str, str, Any]] = []
    if request.response_format is not None:
        found += _response_format(request.response_format)
    for param, kind in _GUIDED.items():
        if (value := getattr(request, param)) is not None:
            found.append((param, kind, value))
    for kind, value in (request.structured_outputs or {}).items():
        param = f"structured_outputs.{kind}"
        if value is None:
            continue
        if kind not in _KINDS:
            raise wrong(param, f"is not served; these are: {', '.join(_KINDS)}")
        found.append((param, kind, value))
    return found


def _response_format(form: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
    kind = form.get("type", "text")
    if kind == "text":
        return []
    if kind == "json_object":
        return [("response_format", "json_object", True)]
    if kind != "json_schema":
        what = f"{short_repr(kind)} is not served; text, json_object and json_schema are"
        raise wrong("response_format.type", what)
    described = form.get("json_schema")
    if not isinstance(described, Mapping):
        raise wrong("response_format.json_schema", "expected an object with name and schema")
    schema = described.get("schema")
    if not isinstance(schema, Mapping):
        raise wrong("response_format.json_schema.schema", f"expected a JSON schema, found {short_repr(schema)}")
    return [("response_format.json_schema.schema", "json", schema)]
