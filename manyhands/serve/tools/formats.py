"""How families write a call: the marks around it, and what stands between them.

Each format's source is the chat template of the models that it is named after; what stands between the marks is read
whole, when the closing mark has come.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from manyhands.serve.tools.calls import Call, Malformed, Schemas, call_of, dumps, first_object, loads, typed


@dataclass(frozen=True)
class Format:
    """One way of writing calls."""

    name: str
    opens: tuple[str, ...]
    closes: tuple[str, ...]
    """Of each that opens; none: to the end of the answer, or to where the next begins."""
    read: Callable[[str, Schemas], list[Call]]
    """What is between the marks, as calls. Raises `Malformed`."""
    bare: bool = False
    """Whether an answer that begins with `{` or with a mark is a call to its end."""


def _tagged(body: str, schemas: Schemas) -> list[Call]:
    """`<tool_call>…</tool_call>`: JSON (Hermes, Qwen), functions in XML (Qwen3-Coder), keys and values (GLM-4.5)."""
    text = body.strip()
    if text.startswith(("{", "[")):
        value = loads(text)
        return [call_of(one) for one in value] if isinstance(value, list) else [call_of(value)]
    if text.startswith("<function="):
        return _functions(text, schemas)
    name, _, rest = text.partition("<arg_key>")
    name = name.strip()
    if not name or re.search(r"[\s<>{}]", name):
        raise Malformed
    pairs = re.findall(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", "<arg_key>" + rest, re.DOTALL)
    if rest and not pairs:
        raise Malformed
    return [Call(name, dumps({key.strip(): typed(value, name, key.strip(), schemas) for key, value in pairs}))]


def _functions(text: str, schemas: Schemas) -> list[Call]:
    """`<function=name><parameter=key>value</parameter>…</function>`, or with JSON inside (Llama 3.1)."""
    calls = []
    for name, inner in re.findall(r"<function=([^>\s]+)>(.*?)(?:</function>|$)", text, re.DOTALL):
        if inner.strip().startswith("{"):
            calls.append(call_of({"name": name, "arguments": loads(inner.strip())}))
            continue
        pairs = re.findall(r"<parameter=([^>]+)>\n?(.*?)\n?(?:</parameter>|(?=<parameter=)|$)", inner, re.DOTALL)
        calls.append(Call(name, dumps({key: typed(value, name, key, schemas) for key, value in pairs})))
    if not calls:
        raise Malformed
    return calls


def _mistral(body: str, schemas: Schemas) -> list[Call]:
    """`[TOOL_CALLS] [{…}, …]`, or `name{…}`, `name[ARGS]{…}`."""
    text = body.strip()
    if text.startswith("["):
        value = loads(text)
        if not isinstance(value, list) or not value:
            raise Malformed
        return [call_of(one) for one in value]
    calls = []
    while text:
        found = re.match(r"([\w.\-]+)\s*(?:\[CALL_ID\]\s*\w+\s*)?(?:\[ARGS\])?\s*(?=\{)", text)
        if found is None:
            raise Malformed
        arguments, text = first_object(text[found.end() :])
        calls.append(call_of({"name": found[1], "arguments": arguments}))
        text = text.strip()
    if not calls:
        raise Malformed
    return calls


def _deepseek(body: str, schemas: Schemas) -> list[Call]:
    """V3 `function<sep>name` and fenced JSON; V3.1 `name<sep>{…}`."""
    calls = []
    for inner in re.findall(r"<｜tool▁call▁begin｜>(.*?)<｜tool▁call▁end｜>", body, re.DOTALL):
        head, _, rest = inner.partition("<｜tool▁sep｜>")
        fenced = re.fullmatch(r"\s*([^\n`{]+?)\s*```(?:json)?\s*(.*?)\s*```\s*", rest, re.DOTALL)
        name, arguments = (fenced[1], fenced[2]) if fenced else (head.strip(), rest.strip())
        calls.append(call_of({"name": name, "arguments": loads(arguments)}))
    if not calls:
        raise Malformed
    return calls


def _kimi(body: str, schemas: Schemas) -> list[Call]:
    """`functions.name:0`, which is the call's id too, and JSON."""
    pattern = r"<\|tool_call_begin\|>\s*(.*?)\s*<\|tool_call_argument_begin\|>(.*?)<\|tool_call_end\|>"
    calls = []
    for id, arguments in re.findall(pattern, body, re.DOTALL):
        name = id.rpartition(":")[0] if re.search(r":\d+$", id) else id
        call = call_of({"name": name.removeprefix("functions."), "arguments": loads(arguments.strip())})
        calls.append(Call(call.name, call.arguments, id))
    if not calls:
        raise Malformed
    return calls


def _minimax(body: str, schemas: Schemas) -> list[Call]:
    """`<invoke name="…"><parameter name="…">value</parameter></invoke>`."""
    calls = []
    for name, inner in re.findall(r'<invoke name="?([^">]+)"?>(.*?)</invoke>', body, re.DOTALL):
        pairs = re.findall(r'<parameter name="?([^">]+)"?>(.*?)</parameter>', inner, re.DOTALL)
        calls.append(Call(name, dumps({key: typed(value.strip("\n"), name, key, schemas) for key, value in pairs})))
    if not calls:
        raise Malformed
    return calls


def _llama(body: str, schemas: Schemas) -> list[Call]:
    """Bare JSON, several with `;` between, after `<|python_tag|>` or not; only names that were offered are calls."""
    text, calls = body.strip(), []
    while text:
        value, text = first_object(text)
        call = call_of(value)
        if schemas and call.name not in schemas:
            raise Malformed
        calls.append(call)
        text = text.lstrip().removeprefix(";").lstrip()
    if not calls:
        raise Malformed
    return calls


TAGGED = Format("tagged", ("<tool_call>",), ("</tool_call>",), _tagged)
CODER = Format("coder", ("<tool_call>", "<function="), ("</tool_call>", "</function>"), _tagged)
MISTRAL = Format("mistral", ("[TOOL_CALLS]",), (), _mistral)
DEEPSEEK = Format("deepseek", ("<｜tool▁calls▁begin｜>",), ("<｜tool▁calls▁end｜>",), _deepseek)
KIMI = Format("kimi", ("<|tool_calls_section_begin|>",), ("<|tool_calls_section_end|>",), _kimi)
MINIMAX = Format("minimax", ("<minimax:tool_call>",), ("</minimax:tool_call>",), _minimax)
LLAMA = Format("llama", ("<|python_tag|>",), (), _llama, bare=True)
HARMONY = Format("harmony", (), (), _tagged)
"""gpt-oss: calls are channels with a recipient (`harmony.py`)."""


def format_of(template: str) -> Format:
    """How the model of this chat template writes calls; as Hermes does, where it says nothing."""
    for format in (DEEPSEEK, KIMI, MINIMAX, MISTRAL):
        if format.opens[0] in template:
            return format
    if "<|channel|>" in template and "<|message|>" in template:
        return HARMONY
    if "<function=" in template and "<parameter=" in template:
        return CODER
    if "<tool_call>" in template:
        return TAGGED
    return LLAMA if "<|python_tag|>" in template or "Environment: ipython" in template else TAGGED
