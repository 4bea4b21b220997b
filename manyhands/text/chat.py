"""Chat templates: messages to the text that a chat model was trained on.

    template = ChatTemplate(tokenizer.chat_template)
    text = template.render([{"role": "user", "content": "Hello"}], bos_token="<s>", eos_token="</s>")

The template is a jinja2 program that comes with the checkpoint. What it may do, and where it runs: `chat_worker.py`.
"""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from manyhands import strict_json
from manyhands.errors import CheckpointError, DataError, ManyhandsError
from manyhands.text.chat_worker import LATE, OUTPUT, SECONDS

Message = Mapping[str, Any]
"""`{"role": "user", "content": "…"}`, and whatever else the template reads; JSON values only."""

_REASONING = ("reasoning_content", "thinking", "reasoning")
_TEMPLATE_BYTES = 1 << 20
_INPUT_BYTES = 16 << 20
_KEPT_VARIABLES = ("LANG", "LC_ALL", "LD_LIBRARY_PATH", "TZ")
"""All of our environment that the worker sees; the rest may be secret."""


class ChatTemplate:
    """A template and the process that renders it: started at the first rendering, started anew after it was killed.

    Threads may share one; they take turns. The process ends with `close`, with this object, or with ours.
    """

    def __init__(self, source: str) -> None:
        """Nothing is run or checked yet but the size. Raises `CheckpointError` for a template over 1 MiB."""
        if len(source.encode("utf-8", "surrogatepass")) > _TEMPLATE_BYTES:
            raise CheckpointError("the chat template is longer than 1 MiB")
        self.source = source
        self._lock = threading.Lock()
        self._stop: weakref.finalize[..., Any] | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process. The template can still be used; that starts another."""
        with self._lock:
            self._end()

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        bos_token: str | None = None,
        eos_token: str | None = None,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        **variables: Any,
    ) -> str:
        """The text of `messages`, ending where the answer begins if `add_generation_prompt`.

        Equal to transformers' `apply_chat_template(…, tokenize=False)`: a message's None values are left out, tokens
        that are None are undefined, a message's reasoning has both names (`thinking`, `reasoning_content`), further
        `variables` are the template's own switches. Where a template fails on the arguments of tool calls as they are,
        an object or JSON text, it is given the other.

        Raises `DataError` if the template refuses the messages (`raise_exception`) or they are not JSON or longer
        than 16 MiB; `CheckpointError` if the template is not valid, leaves the sandbox, or takes more than 2 s, 256 MiB
        of memory or 1 MiB of text.
        """
        return self.render_with_origin(
            messages,
            add_generation_prompt=add_generation_prompt,
            bos_token=bos_token,
            eos_token=eos_token,
            tools=tools,
            documents=documents,
            **variables,
        )[0]

    def render_with_origin(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        bos_token: str | None = None,
        eos_token: str | None = None,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        own: Collection[str] = (),
        marked: bool = False,
        **variables: Any,
    ) -> tuple[str, bytes]:
        """`render`, and a byte for each character that says where it comes from (`origin.py`).

        `own` names the variables that are the model's (`pad_token`) beside bos and eos; the others are somebody's text.
        `marked` puts marks around what stands in the template's `{% generation %}` blocks (`marks.py`).
        """
        tokens = {"bos_token": bos_token, "eos_token": eos_token}
        variables |= {name: token for name, token in tokens.items() if token is not None}
        variables |= {"tools": tools, "documents": documents, "add_generation_prompt": add_generation_prompt}
        variables["messages"] = [_as_templates_read_it(message) for message in messages]
        own_names = [name for name in (*own, *tokens) if isinstance(variables.get(name), str)]
        if not messages:
            raise DataError("there are no messages to apply the chat template to")
        kind, text, origin = self._render(variables, own_names, marked)
        for convert in (_parsed, _written):  # tool calls have arguments as an object or as JSON; a template knows one
            if kind != b"?" or not ("TypeError" in text or "UndefinedError" in text):  # `'{}' | length`, `'{}'.items()`
                break
            other = {**variables, "messages": _with_arguments(variables["messages"], convert)}
            if other["messages"] != variables["messages"]:
                again = self._render(other, own_names, marked)
                kind, text, origin = again if again[0] != b"?" else (kind, text, origin)
        if kind == b"!":
            raise DataError(f"the chat template refuses these messages: {_line(text)}")
        if kind == b"?":
            raise CheckpointError(f"the chat template failed: {_line(text)}")
        return text, origin

    def _render(self, variables: dict[str, Any], own: list[str], marked: bool) -> tuple[bytes, str, bytes]:
        """The worker's answer."""
        asked = {"template": self.source, "variables": variables, "own": own, "marked": marked}
        try:
            request = json.dumps(asked).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise DataError(f"the messages are not plain JSON values: {_line(str(error))}") from None
        if len(request) > _INPUT_BYTES:
            raise DataError(f"the conversation is longer than {_INPUT_BYTES >> 20} MiB")
        with self._lock:
            try:
                return self._ask(request)
            except BaseException:  # killed, or Ctrl-C in the middle of an answer that nobody will read now
                self._end()
                raise

    def _ask(self, request: bytes) -> tuple[bytes, str, bytes]:
        process = self._process
        if process is None or process.poll() is not None:
            process = self._start()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(len(request).to_bytes(4, "big") + request)
            process.stdin.flush()
        except BrokenPipeError:
            raise _death(process) from None
        head = process.stdout.read(5)
        kind, size = head[:1], int.from_bytes(head[1:], "big")
        if size > OUTPUT + 4096:  # a worker that a template has taken over
            raise CheckpointError("the chat template failed: its process answered nonsense")
        data = process.stdout.read(size)
        if len(head) < 5 or len(data) < size:
            raise _death(process)
        text = data.decode("utf-8", "surrogatepass")
        if kind != b"=":
            return kind, text, b""
        if len(count := process.stdout.read(4)) < 4:
            raise _death(process)
        if int.from_bytes(count, "big") != len(text):
            raise CheckpointError("the chat template failed: its process answered nonsense")
        if len(origin := process.stdout.read(len(text))) < len(text):
            raise _death(process)
        return kind, text, origin

    def _start(self) -> subprocess.Popen[bytes]:
        """A process of its own, not a fork: ours has threads."""
        self._end()
        worker = str(Path(__file__).with_name("chat_worker.py"))
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", worker, *_homes("jinja2", "markupsafe")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ},
            start_new_session=True,  # Ctrl-C is for us
        )
        self._process, self._stop = process, weakref.finalize(self, _stop, process)
        assert process.stdout is not None
        if process.stdout.read(1) != b"+":
            raise ManyhandsError(f"the process for chat templates did not start: {sys.executable} {worker}")
        return process

    def _end(self) -> None:
        if self._stop is not None:
            self._stop()
        self._process = self._stop = None


def render(
    template: str,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    bos_token: str | None = None,
    eos_token: str | None = None,
    tools: Sequence[Any] | None = None,
    documents: Sequence[Any] | None = None,
    **variables: Any,
) -> str:
    """`ChatTemplate.render` once, in a process of its own (some 0.1 s)."""
    with ChatTemplate(template) as once:
        return once.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            bos_token=bos_token,
            eos_token=eos_token,
            tools=tools,
            documents=documents,
            **variables,
        )


def _as_templates_read_it(message: Message) -> dict[str, Any]:
    """Without None, and its reasoning under both names that templates know, as transformers does."""
    if not isinstance(message, Mapping):
        raise DataError(f"a message is an object with role and content, not {type(message).__name__}")
    values = {name: value for name, value in message.items() if value is not None}
    reasoning = next((values[name] for name in _REASONING if name in values), None)
    return values if reasoning is None else {"thinking": reasoning, **values, "reasoning_content": reasoning}


def _with_arguments(messages: list[dict[str, Any]], convert: Callable[[Any], Any]) -> list[dict[str, Any]]:
    """The messages, with the arguments of their tool calls in another form."""

    def call(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        value = dict(value)
        if isinstance(value.get("function"), Mapping):
            value["function"] = call(value["function"])
        if "arguments" in value:
            value["arguments"] = convert(value["arguments"])
        return value

    calls = [message.get("tool_calls") for message in messages]
    return [
        {**message, "tool_calls": list(map(call, own))} if isinstance(own, list | tuple) else message
        for message, own in zip(messages, calls, strict=True)
    ]


def _parsed(arguments: Any) -> Any:
    """JSON text, as APIs send it, as the object that templates look into."""
    if not isinstance(arguments, str):
        return arguments
    try:
        value = strict_json.loads(arguments)
    except ValueError:
        return arguments
    return value if isinstance(value, dict) else arguments


def _written(arguments: Any) -> Any:
    """An object as the JSON text that some templates paste."""
    return json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else arguments


def _homes(*packages: str) -> list[str]:
    """The directories that the packages are imported from here."""
    specs = [importlib.util.find_spec(package) for package in packages]
    return [str(Path(spec.origin).parent.parent) for spec in specs if spec is not None and spec.origin is not None]


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):  # it died with a part of a request unread
                pipe.close()


def _death(process: subprocess.Popen[bytes]) -> CheckpointError:
    code = process.wait()
    if code == LATE:
        return CheckpointError(f"the chat template failed: it takes longer than {SECONDS:g} s")
    return CheckpointError(f"the chat template failed: it brought its process down (exit code {code})")


def _line(text: str) -> str:
    """One line that is safe on a terminal."""
    line = " ".join(text.split())
    return "".join(c for c in line if c.isprintable())[:300]
