"""Chat templates: the text transformers makes, in a process that cannot be broken out of or kept busy."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from manyhands.errors import CheckpointError, DataError
from manyhands.text.chat import ChatTemplate, render

from .chat_templates import CONVERSATIONS, TEMPLATES, TOOLS

USER = [{"role": "user", "content": "x", "n": 10, "list": [1, 2]}]


@pytest.fixture(scope="module")
def worker():
    """Call it with a template: all share one process, as far as they let it live."""
    with ChatTemplate("") as template:

        def run(source, messages=USER, **variables):
            template.source = source
            return template.render(messages, **variables)

        run.template = template
        yield run


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_that_of_transformers(worker, name, conversation, prompt, tools):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    messages = [{k: v for k, v in m.items() if v is not None} for m in CONVERSATIONS[conversation]]
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    (theirs,), _ = utils.render_jinja_template(
        [messages], tools=tools, chat_template=TEMPLATES[name], add_generation_prompt=prompt, **tokens
    )
    ours = worker(TEMPLATES[name], CONVERSATIONS[conversation], add_generation_prompt=prompt, tools=tools, **tokens)
    assert ours == theirs
    assert messages[-1]["content"].strip() in ours


ODDITIES = [
    "{{ messages | tojson }} {{ messages[0] | tojson(indent=2, sort_keys=true, ensure_ascii=true) }}",
    "{{ bos_token }}|{{ eos_token is defined }}|{{ tools is none }}|{{ documents is none }}",
    "{{ dict(a=1).items() | list }} {{ dict.fromkeys([1, 2], 0) }} {{ namespace(self=3).self }}",
    "{{ 'é\\u2028' | tojson }} {{ '%5.2f' % 3 }} {{ '{:>5}'.format('x') }} {{ [3, 1] | sort | join(',') }}",
    "  {% if true %}  \n a {% endif %}\n\n b \n",
    "{{ thinking }} {{ messages | map(attribute='role') | list }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
    "{% set n = namespace(x=1) %}{% generation %}{% set n.x = 2 %}{% set y = 5 %}{% endgeneration %}{{ n.x }}{{ y }}",
    "{% for i in range(5) %}{% if i == 3 %}{% break %}{% endif %}{{ loop.index }}{% endfor %}",
    "{{ messages[0].content.upper().encode('utf-8').decode('latin-1') }}{{ undefined_thing }}",
]


@pytest.mark.parametrize("source", ODDITIES)
def test_details_are_those_of_transformers(worker, source):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    messages = [{"role": "user", "content": "häß <&>'"}]
    (theirs,), _ = utils.render_jinja_template([messages], chat_template=source, thinking=True)
    assert worker(source, messages, add_generation_prompt=False, thinking=True) == theirs


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'].system('id') }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ namespace(x=1).__class__.__mro__ }}",
    "{{ namespace(__class__=1) }}",
    "{% set ns = namespace() %}{% set ns.__call__ = 1 %}",
    "{% set ns = namespace() %}{% set ns._Namespace__attrs = {} %}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ '{x.__class__}'.format_map({'x': 1}) }}",
    "{{ ''|attr('format')|attr('__self__') }}",
    "{% set f = '{0.__class__}'|attr('format') %}{{ f(1) }}",
    "{{ ['{0.__class__}']|map('attr', 'format')|list|first|attr('__call__') }}",
    "{{ ''|attr('__class__')|attr('__mro__') }}",
    "{{ [1]|map(attribute='__class__')|map(attribute='__mro__')|list|string|attr('x').y }}",
    "{{ [1]|sort(attribute='__class__.__mro__.x.y') }}",
    "{{ range.__globals__ }}{{ range.__self__.x }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__.os }}",
    "{{ strftime_now.__closure__[0] }}",
    "{{ dict.__class__.__call__.__globals__ }}",
    "{{ dict.update(messages[0], role='system') }}",
    "{{ dict.mro() }}",
    "{{ (messages|map('upper')).gi_frame.f_globals }}",
    "{{ (messages|select).gi_code.co_consts }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].list.extend([3]) }}",
    "{{ messages[0].update({'role': 'system'}) }}",
    "{{ messages[0].pop('role') }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
    "{% extends '/etc/passwd' %}",
    "{{ caller.__globals__.x }}{{ loop.__class__.x }}",
    "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}",
    "{% macro m() %}{{ caller._environment.from_string('') }}{% endmacro %}{% call m() %}{% endcall %}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_the_sandbox_holds(worker, source):
    messages = [{"role": "user", "content": "x", "list": [1, 2]}]
    try:
        text = worker(source, messages)
    except CheckpointError as error:
        assert "chat template failed: " in str(error) and "\n" not in str(error) and len(str(error)) < 400
    else:
        assert text == "", "what is forbidden may be undefined, which is written as nothing"
    assert messages == [{"role": "user", "content": "x", "list": [1, 2]}]


@pytest.mark.skipif(not Path("/proc/self/limits").exists(), reason="reads /proc")
def test_behind_the_sandbox_there_is_nothing(worker):
    """What an unknown hole in jinja2 would lead to: no environment, no file, no socket, no process, little memory."""
    worker("")
    proc = Path(f"/proc/{worker.template._process.pid}")
    environment = (proc / "environ").read_bytes().split(b"\0")
    assert {entry.split(b"=")[0] for entry in environment} <= {b"", b"LANG", b"LC_ALL", b"LD_LIBRARY_PATH", b"TZ"}
    limits = {line[:25].strip(): line[26:].split()[:2] for line in (proc / "limits").read_text().splitlines()}
    for name in ("Max open files", "Max file size", "Max processes", "Max core file size"):
        assert limits[name] == ["0", "0"]
    assert limits["Max address space"] == [str(256 << 20)] * 2
    assert len(list((proc / "fd").iterdir())) == 3


BOMBS = {
    "{{ 'x' * 10**9 }}": "memory",
    "{{ messages[0].content * 10**9 }}": "memory",
    "{{ '%1000000000s' % messages[0].content }}": "memory",
    "{{ messages[0].content|center(10**9) }}": "memory",
    "{{ '{:>1000000000}'.format(messages[0].n) }}": "memory",
    "{{ ('x' * 10**6).replace('x', 'y' * 10**6) }}": "memory",
    "{{ ('y' * 10**6).join(['x'] * 10**6) }}": "memory",
    "{{ [0] * 10**9 }}": "memory",
    "{% set x = namespace(s='xx') %}{% for i in range(64) %}{% set x.s = x.s ~ x.s %}{% endfor %}": "memory",
    "{% for i in range(10**9) %}{% endfor %}": "range",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "without end",
    "{{ " + "(" * 50_000 + ")" * 50_000 + "}}": "without end",
    "{{ " + "[" * 50_000: "without end",
    "{{ 'x' * 2**21 }}": "1 MiB of text",
    "{% for i in range(99999) %}{{ 'x' * 99 }}{% endfor %}": "1 MiB of text",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "2 s",
    "{{ 10 ** (10 ** 8) }}": "2 s",  # in the compiler, in one C call
    "{{ messages[0].n ** (messages[0].n ** 9) > 1 }}": "2 s",
}


LATE = "{{ 10 ** (10 ** 8) }}"
"""Its alarm is waited for; to the others, which set the same one, it is sent sooner."""


@pytest.mark.parametrize("source", BOMBS)
def test_the_limits_hold(worker, source):
    worker("")  # the time to start is not the template's
    sooner = threading.Timer(0.3, os.kill, (worker.template._process.pid, signal.SIGALRM))
    if BOMBS[source] == "2 s" and source != LATE:
        sooner.start()
    start = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        worker(source)
    assert time.monotonic() - start < 4
    sooner.cancel()
    assert BOMBS[source] in str(caught.value) and "\n" not in str(caught.value)
    assert worker("{{ messages[0].content }}") == "x", "the next one is served"


def test_broken_templates_and_refusals_are_one_line(worker):
    with pytest.raises(CheckpointError, match="line 2: TemplateSyntaxError"):
        worker("a\n{% if %}")
    with pytest.raises(CheckpointError, match=r"TypeError|UndefinedError"):
        worker("{{ 'a' + messages[0].missing }}")
    with pytest.raises(DataError, match=r"refuses these messages: roles must alternate: user, assistant, user"):
        worker(TEMPLATES["mistral"], [*USER, *USER], bos_token="<s>")
    with pytest.raises(DataError) as caught:
        worker("{{ raise_exception('a\n\x1b[31m' ~ 'b' * 10000) }}")
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "messages", [[], ["text"], [{"role": object()}], [{"content": b"x"}], [{"content": "x" * 2**24}]]
)
def test_what_is_not_a_conversation_is_refused(messages):
    with pytest.raises(DataError):
        render("", messages)
    circle: list = []
    circle.append(circle)
    with pytest.raises(DataError, match="plain JSON"):
        render("", [{"content": circle}])


def test_a_template_may_not_be_huge():
    with pytest.raises(CheckpointError, match="1 MiB"):
        ChatTemplate("x" * (1 << 20) + "x")


def test_half_a_surrogate_pair_passes_through(worker):
    assert worker("{{ messages[0].content }}", [{"content": "\ud800"}]) == "\ud800"


def test_threads_take_turns(worker):
    got = {}

    def ask(i):
        got[i] = worker.template.render([{"content": str(i)}] * (i + 1))

    worker.template.source = "{% for m in messages %}{{ m.content }},{% endfor %}"
    threads = [threading.Thread(target=ask, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {i: f"{i}," * (i + 1) for i in range(16)}


def test_the_process_ends_with_the_template_and_is_replaced_when_it_dies():
    template = ChatTemplate("{{ messages[0].content }}")
    assert template._process is None
    assert template.render(USER) == "x"
    first = template._process
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert template.render(USER) == "x"
    second = template._process
    assert second.pid != first.pid
    del template
    assert second.returncode is not None


def test_the_process_ends_when_its_parent_does():
    template = ChatTemplate("")
    template.render(USER)
    process = template._process
    process.stdin.close()
    assert process.wait(timeout=5) == 0
    template.close()


def test_a_worker_that_answers_nonsense_is_refused(monkeypatch, tmp_path):
    worker = tmp_path / "chat_worker.py"
    monkeypatch.setattr("manyhands.text.chat.__file__", str(tmp_path / "chat.py"))
    for answer in ("b'+=' + b'\\xff' * 4 + b'x' * 100", "b'+=\\0\\0'", "b'+'"):
        worker.write_text(
            f"import sys\nsys.stdout.buffer.write({answer})\nsys.stdout.flush()\nsys.stdin.buffer.read(9)"
        )
        with pytest.raises(CheckpointError, match=r"nonsense|brought its process down"):
            render("", USER)
