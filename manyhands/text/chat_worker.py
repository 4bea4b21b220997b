"""The process that renders chat templates. It holds jinja2 and limits, and nothing of manyhands.

    python -I -S chat_worker.py DIRECTORY…       where jinja2 and markupsafe lie

A template comes with a checkpoint from anywhere, so it is run as if it were an attack: in jinja2's immutable sandbox,
in a process that has no secrets, cannot open a file or a socket, has little memory, and is killed by the kernel when
the time is over. `chat.py` is the other end.

Request on stdin: 4 bytes of length, then JSON `{"template": …, "variables": {…}, "own": […], "marked": false}`; the
variables named in `own` are the template's (`bos_token`), the others came with the messages; `marked` asks for the
marks of `marks.py` around what the model wrote. Answer on stdout: one byte of kind (`=` the
text, `!` the template refused the messages, `?` it failed), 4 bytes of length, UTF-8; behind a text 4 bytes of length
and one byte per character, which say where it comes from (`origin.py`).
"""

import codecs
import contextlib
import importlib.util
import json
import os
import pprint  # noqa: F401  a filter imports it late, when no file can be opened any more
import random  # noqa: F401
import signal
import sys
import textwrap  # noqa: F401
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

SECONDS = 2.0
LATE = -signal.SIGALRM if hasattr(signal, "SIGALRM") else 14
MEMORY = 256 << 20
OUTPUT = 1 << 20
"""Of one rendering: wall time; address space of the process; UTF-8 bytes of the text."""

if TYPE_CHECKING:
    from jinja2 import Template

    from manyhands.text import origin


def main() -> None:
    """Answer requests until stdin ends."""
    sys.path += sys.argv[1:]
    global origin
    origin = _origin()
    environments = [_environment(marked) for marked in (False, True)]
    compiled = lru_cache(maxsize=2)(lambda template, marked: environments[marked].from_string(template))
    _lock_up()
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    answers.write(b"+")
    answers.flush()
    while header := requests.read(4):
        request = json.loads(requests.read(int.from_bytes(header, "big")))
        with _in_time():
            kind, text = _answer(compiled, request)
        data = text.encode("utf-8", "surrogatepass")
        answers.write(kind + len(data).to_bytes(4, "big") + data)
        if kind == b"=":
            answers.write(len(text).to_bytes(4, "big") + origin.origin_of(text))
        answers.flush()


def _answer(compiled: "Callable[[str, bool], Template]", request: dict[str, Any]) -> tuple[bytes, str]:
    try:
        pieces, size = [], 0
        own = set(request["own"])
        variables = {
            name: origin.own(value) if name in own else origin.foreign(value)
            for name, value in request["variables"].items()
        }
        for piece in compiled(request["template"], request["marked"]).generate(**variables):
            pieces.append(piece)
            size += len(piece.encode("utf-8", "surrogatepass"))
            if size > OUTPUT:
                return b"?", f"it wrote more than {OUTPUT >> 20} MiB of text"
        return b"=", origin.join("", pieces)
    except MemoryError:
        return b"?", f"it needs more than {MEMORY >> 20} MiB of memory"
    except RecursionError:
        return b"?", "it calls itself without end"
    except Exception as error:
        if type(error).__name__ == "Refusal":
            return b"!", str(error)[:1000]
        line = getattr(error, "lineno", None)
        where = f"line {line}: " if line else ""
        return b"?", f"{where}{type(error).__name__}: {str(error)[:1000]}"


def _origin() -> Any:
    """The module beside this file, alone: nothing else of the package is loaded."""
    path = Path(__file__).with_name("origin.py")
    spec = importlib.util.spec_from_file_location("origin", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _environment(marked: bool) -> Any:
    """jinja2 as chat templates expect it: transformers' whitespace rules, tags, filters and functions."""
    import jinja2.debug
    import jinja2.runtime
    from jinja2 import TemplateError, nodes, pass_environment
    from jinja2.compiler import CodeGenerator
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.filters import make_attrgetter
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
    from jinja2.utils import Namespace

    class Generation(Extension):
        """`{% generation %}…{% endgeneration %}` marks what the model wrote, for training; here it is its content."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            if marked:
                before, after = (nodes.Output([nodes.TemplateData(mark)], lineno=line) for mark in origin.MARKS)
                body = [before, *body, after]
            return nodes.Scope(body, lineno=line)

    class Refusal(TemplateError):
        """What `raise_exception` raises."""

    class PublicNamespace(Namespace):
        """Without names that Python itself looks up."""

        def __init__(*args: Any, **kwargs: Any) -> None:  # any keyword may be an attribute, `self` too
            values = dict(*args[1:], **kwargs)
            for name in values:
                refuse_private(name)
            Namespace.__init__(args[0], values)

        def __setitem__(self, name: str, value: Any) -> None:
            refuse_private(name)
            super().__setitem__(name, value)

    class PublicDict:
        """`dict` without `dict.update(other, …)` and the like, by which the class could change its instances."""

        def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
            return dict(*args, **kwargs)

        def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
            return dict.fromkeys(keys, value)

    def refuse_private(name: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace has no attribute {name!r}")

    def raise_exception(message: Any) -> None:
        raise Refusal(str(message))

    def strftime_now(format: str) -> str:
        return datetime.now().strftime(format)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        return str(origin.foreign(text))

    @pass_environment
    def join(environment: Any, value: Any, d: Any = "", attribute: Any = None) -> str:
        if attribute is not None:
            value = map(make_attrgetter(environment, attribute), value)
        return origin.join(str(d), map(str, value))

    def joined(pieces: Any) -> str:
        return origin.join("", pieces)

    class Own(CodeGenerator):
        """What the template writes is known as its own."""

        def visit_Const(self, node: nodes.Const, frame: Any) -> None:
            value = node.as_const(frame.eval_ctx)
            if isinstance(value, str):
                self.write(f"environment.own({str.__str__(value)!r})")
            else:
                super().visit_Const(node, frame)

        def visit_TemplateData(self, node: nodes.TemplateData, frame: Any) -> None:
            self.write(f"environment.own({node.data!r})")

        def _output_const_repr(self, group: Any) -> str:
            return f"environment.own({''.join(group)!r})"

    class Environment(ImmutableSandboxedEnvironment):
        code_generator_class = Own
        concat = staticmethod(joined)
        own = staticmethod(origin.own)

        def wrap_str_format(self, value: Any) -> Any:
            wrapped = super().wrap_str_format(value)
            text = getattr(value, "__self__", None)
            if wrapped is None or not isinstance(text, origin.Text) or value.__name__ == "format_map":
                return wrapped
            vformat = SandboxedFormatter(self).vformat
            return lambda *args, **kwargs: text.formatted(vformat, args, kwargs)

    vars(jinja2.runtime)["str_join"] = lambda pieces: joined(map(str, pieces))  # `~`, in the code of templates
    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[Generation, loopcontrols]
    )
    environment.filters |= {"tojson": tojson, "join": join}
    environment.globals |= {
        "dict": PublicDict(),
        "namespace": PublicNamespace,
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
    }
    return environment


def _lock_up() -> None:
    """From here on: little memory, no new file, socket or process, and an alarm that nothing can hold back."""
    time.localtime()  # reads the time zone while files can be opened
    for codec in ("unicode-escape", "ascii", "latin-1"):  # jinja2 reads its strings through the first
        codecs.lookup(codec)
    limits = {"AS": MEMORY, "NOFILE": 0, "FSIZE": 0, "NPROC": 0, "CORE": 0}
    resource = _resource()
    for name, limit in limits.items() if resource is not None else ():
        with contextlib.suppress(ValueError, OSError):  # not every system knows every limit
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})


def _resource() -> Any:
    try:
        return importlib.import_module("resource")
    except ImportError:  # Windows, where only the time is limited
        return None


@contextlib.contextmanager
def _in_time() -> Iterator[None]:
    """SIGALRM ends the process, whatever it is in the middle of; on Windows a thread does, between two instructions."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        yield
        signal.setitimer(signal.ITIMER_REAL, 0)
    else:
        timer = threading.Timer(SECONDS, os._exit, (LATE,))
        timer.start()
        yield
        timer.cancel()


if __name__ == "__main__":
    main()
