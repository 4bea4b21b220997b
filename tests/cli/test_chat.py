"""`manyhands chat` as a person uses it, from a pipe and on a terminal."""

import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ..small_runs import SMALL, manyhands, write_text

TEMPLATE = """\
{% for message in messages %}
{% if message.role == 'system' and message.content == 'refused' %}{{ raise_exception('not this one') }}{% endif %}
{{ message.role }}: {{ message.content }}
{% endfor %}
{% if add_generation_prompt %}
assistant:
{%- endif %}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small run in `run`, and templates."""
    folder = tmp_path_factory.mktemp("chat")
    text = str(write_text(folder))
    changes = [*SMALL, "model.max_position_embeddings=1024"]
    done = manyhands("train", "--preset", "tiny", "--out", str(folder / "run"), "--data", text, "--quiet", *changes)
    assert done.returncode == 0, done.stderr
    (folder / "template.jinja").write_text(TEMPLATE)
    (folder / "broken.jinja").write_text("{% if %}")
    (folder / "latin.jinja").write_bytes(b"\xe9")
    (folder / "endless.jinja").write_text(
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    )
    return folder


def chat(run: Path, *arguments: str, stdin: str, template: str = "template.jinja") -> tuple[int, str, str]:
    done = manyhands("chat", "run", "--template", template, *arguments, stdin=stdin, cwd=run)
    return done.returncode, done.stdout, done.stderr


def test_each_piped_line_is_a_turn(run: Path) -> None:
    arguments = ("--max-new-tokens", "6", "--temperature", "0")
    code, out, err = chat(run, *arguments, stdin="line 3\n\n  \nline 4\n")
    assert code == 0 and err.count("[cut off: --max-new-tokens 6]") == 2
    again = chat(run, *arguments, stdin="line 3\nline 4\n/exit\nnever said")
    assert again == (code, out, err)
    first = chat(run, *arguments, stdin="line 3")[1]
    assert out.startswith(first) and len(out) > len(first)
    reset = chat(run, *arguments, stdin="line 3\n/reset\nline 3\n")[1]
    assert reset == first + first


def test_commands(run: Path) -> None:
    code, out, err = chat(run, stdin="/help\n/rest\n/exit\n")
    assert code == 0 and out == ""
    assert "/reset" in err and "no command /rest" in err


def test_the_experts_are_shown(run: Path) -> None:
    code, out, _ = chat(run, "--show-routing", "--max-new-tokens", "3", stdin="line")
    assert code == 0 and len(out.splitlines()) == 3 and all("L1" in line for line in out.splitlines())


def test_a_stop_string_ends_an_answer(run: Path) -> None:
    _, out, _ = chat(run, "--max-new-tokens", "40", "--temperature", "0", stdin="line 3")
    stop = out[2:5]
    _, short, err = chat(run, "--max-new-tokens", "40", "--temperature", "0", "--stop", stop, stdin="line 3")
    assert short == out[: out.index(stop)] + "\n" and err == ""


def test_the_context_fills_up(run: Path) -> None:
    code, out, err = chat(run, "--max-new-tokens", "500", "--temperature", "0", stdin="zq" * 490)
    assert code == 0 and "[cut off: the context is full: /reset" in err and out
    code, _, err = chat(run, stdin="zq" * 600)
    assert code == 2 and "context holds 1024" in err and len(err.strip().splitlines()) == 1


MISTAKES = {
    "no template": (["chat", "run"], "run has no chat template: `manyhands generate` continues text"),
    "no such template": (["chat", "run", "--template", "nowhere.jinja"], "nowhere.jinja: cannot be read"),
    "a folder": (["chat", "run", "--template", "run"], "run: cannot be read"),
    "not text": (["chat", "run", "--template", "latin.jinja"], "not UTF-8"),
    "broken": (["chat", "run", "--template", "broken.jinja"], "line 1: TemplateSyntaxError"),
    "endless": (["chat", "run", "--template", "endless.jinja"], "longer than 2 s"),
    "refused": (["chat", "run", "--template", "template.jinja", "--system", "refused"], "not this one"),
    "no model": (["chat", "nowhere", "--template", "template.jinja"], "nowhere"),
    "bad sampling": (["chat", "run", "--top-p", "7"], "top_p"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(run: Path, mistake: str) -> None:
    arguments, said = MISTAKES[mistake]
    done = manyhands(*arguments, stdin="hello\n", cwd=run)
    assert done.returncode == 2 and done.stdout == "" and said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith("manyhands: ")


def test_a_terminal(run: Path) -> None:
    """Ctrl-C stops the answer and Ctrl-D ends, with exit code 0; a mistake in a turn does not end the conversation."""
    ours, theirs = pty.openpty()
    options = ["--template", "template.jinja", "--temperature", "0", "--max-new-tokens", "1000"]
    command = [sys.executable, "-m", "manyhands", "chat", "run", *options]
    environment = {**os.environ, "TERM": "dumb", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=run, env=environment, start_new_session=True
    )
    os.close(theirs)
    try:
        wait_for(ours, "> ")
        os.write(ours, b"zq" * 600 + b"\n")
        wait_for(ours, "context holds 1024")
        wait_for(ours, "> ")
        os.write(ours, b"zq" * 20 + b"\n")
        wait_for(ours, "\n")
        wait_for(ours, "e")  # a part of the answer
        process.send_signal(signal.SIGINT)
        wait_for(ours, "[stopped]")
        wait_for(ours, "> ")
        time.sleep(0.5)  # readline waits for a key only after it has written the prompt, and misses a signal before
        process.send_signal(signal.SIGINT)
        wait_for(ours, "Ctrl-D or /exit ends")
        wait_for(ours, "> ")
        os.write(ours, b"\x04")
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def wait_for(terminal: int, text: str, seconds: float = 30) -> None:
    """Read until `text` has come."""
    got, until = b"", time.monotonic() + seconds
    while text.encode() not in got:
        ready, _, _ = select.select([terminal], [], [], max(0, until - time.monotonic()))
        assert ready, f"{text!r} never came, but {got!r}"
        try:
            got += os.read(terminal, 1)
        except OSError:
            raise AssertionError(f"it ended after {got!r}") from None
