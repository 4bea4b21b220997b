"""`manyhands chat` as a person uses it, from a pipe and on a terminal."""

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from manyhands.cli.turns import turns

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
    done = manyhands("chat", "run", "-q", "--template", template, *arguments, stdin=stdin, cwd=run)
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


def test_what_is_mistyped_does_not_go_to_the_model(run: Path) -> None:
    code, out, err = chat(run, stdin="/sistem be brief\n/hepl\n/reset now\n/safe x\n")
    assert code == 0 and out == "" and "[" not in err and len(err.splitlines()) == 4
    code, out, err = chat(run, stdin="/?\n/clear\n/bye\nnever said\n")
    assert code == 0 and out == "" and "/regenerate" in err and "[forgotten]" in err
    err = chat(run, stdin="/sistem be brief\n/hepl\n/reset now\n")[2]
    assert "no command /sistem" in err and "did you mean /help?" in err and "/reset takes nothing" in err


def test_turns_are_taken_back_written_and_read(run: Path) -> None:
    """Each command from a pipe: the answers are those of the conversation that it leaves."""
    arguments = ("--max-new-tokens", "5", "--temperature", "0")
    one, two = chat(run, *arguments, stdin="line 3\n")[1], chat(run, *arguments, stdin="line 3\nline 4\n")[1]
    (run / "other.json").write_text("{}")
    said = "line 3\nline 9\n/undo\n/save talk.json\n/save other.json\nline 4\n"
    code, out, err = chat(run, *arguments, stdin=said)
    assert code == 2 and "other.json: exists and was not made by this program" in err
    assert "taken back: line 9" in err and "2 messages written to talk.json" in err
    code, out, err = chat(run, *arguments, stdin="/load talk.json\nline 4\n/regenerate\n")
    answer = two.removeprefix(one)
    assert code == 0 and out == answer + answer and "2 messages from talk.json" in err
    system = chat(run, *arguments, "--system", "be brief", stdin="line 3\n")[1]
    code, out, err = chat(run, *arguments, stdin="/system be brief\nline 3\n/undo\n/system\nline 3\n")
    assert code == 0 and out == system + one and "nothing now" in err
    empty = [{"role": "user", "content": ""}, {"role": "assistant", "content": "a"}]
    (run / "empty.json").write_text(json.dumps({"messages": empty}))
    code, out, err = chat(run, stdin="/load empty.json\n/undo\n/undo\n")
    assert code == 0 and "taken back: " in err and "nothing to take back" in err and "Traceback" not in err
    assert "takes the name of a file" in chat(run, stdin="/save\n")[2]
    assert "nothing was asked yet" in chat(run, stdin="/regenerate\n")[2]


def test_a_block_is_one_turn(run: Path) -> None:
    arguments = ("--max-new-tokens", "3")
    code, _, err = chat(run, *arguments, stdin='"""line 3\n\n  line 4\n"""\n//help\n/etc/passwd?\n')
    assert code == 0 and err.count("[cut off") == 3
    assert list(said('a\n"""b"""\n"""\n\n c\n/exit\n"""\n"""open\n')) == ["a", "b", " c\n/exit", "open"]


def said(text: str) -> list[str]:
    before, sys.stdin = sys.stdin, io.StringIO(text)
    try:
        return list(turns(interactive=False))
    finally:
        sys.stdin = before


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
    done = manyhands(*arguments, "-q", stdin="hello\n", cwd=run)
    assert done.returncode == 2 and done.stdout == "" and said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith("manyhands: ")


def test_a_terminal(run: Path) -> None:
    """Ctrl-C stops the answer and Ctrl-D ends, with exit code 0; a mistake in a turn does not end the conversation."""
    ours, theirs = pty.openpty()
    options = ["--template", "template.jinja", "--temperature", "0", "--max-new-tokens", "1000"]
    command = [sys.executable, "-m", "manyhands", "chat", "run", *options]
    environment = {**os.environ, "TERM": "dumb", "OMP_NUM_THREADS": "1", "XDG_STATE_HOME": str(run / "state")}
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=run, env=environment, start_new_session=True
    )
    os.close(theirs)
    try:
        wait_for(ours, "run: ")
        wait_for(ours, "parameters")
        wait_for(ours, "context 1,024 tokens")
        wait_for(ours, "> ")
        os.write(ours, b"/regenerate\n")
        wait_for(ours, "nothing was asked yet")
        wait_for(ours, "> ")
        os.write(ours, b"/show\n")
        wait_for(ours, "temperature 0.0; 0 turns; context 1,024 tokens")
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
        for _ in range(10):  # readline waits for a key only after it has written the prompt, and misses a signal before
            process.send_signal(signal.SIGINT)
            if select.select([ours], [], [], 2.0)[0]:
                break
        wait_for(ours, "Ctrl-D or /exit ends")
        wait_for(ours, "> ")
        os.write(ours, b"\x04")
        assert process.wait(timeout=20) == 0
        kept = run / "state" / "manyhands" / "chat_history"
        assert kept.read_text().splitlines() == ["/regenerate", "/show", "zq" * 600, "zq" * 20]
        assert kept.stat().st_mode & 0o777 == 0o600 and kept.parent.stat().st_mode & 0o777 == 0o700
    finally:
        process.kill()
        process.wait()
        os.close(ours)


@pytest.mark.parametrize("brackets", [("\x1b[200~", "\x1b[201~"), ("", "")], ids=["bracketed", "plain"])
def test_a_pasted_text_is_one_turn(brackets: tuple[str, str]) -> None:
    program = "from manyhands.cli.turns import turns\nfor text in turns(True): print('TURN', repr(text), flush=True)"
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm"},
        start_new_session=True,
    )
    os.close(theirs)
    try:
        wait_for(ours, "> ")
        os.write(ours, (brackets[0] + "one\n  two\n\nthree" + brackets[1] + "\n").encode())
        wait_for(ours, "TURN 'one\\n  two\\n\\nthree'")
        wait_for(ours, "> ")
        os.write(ours, b"four\n")
        wait_for(ours, "TURN 'four'")
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


def test_generate_and_chat_sample_as_the_publisher_does(run: Path) -> None:
    folder = run / "published"
    if not folder.exists():
        assert manyhands("convert", "run", "published", cwd=run).returncode == 0
    (folder / "generation_config.json").write_text('{"do_sample": false, "repetition_penalty": 1.05}')
    (folder / "manifest.json").unlink()  # as a publisher has it
    greedy = manyhands("generate", "run", "--prompt", "line", "--temperature", "0", "--max-new-tokens", "5", cwd=run)
    done = manyhands("generate", "published", "--prompt", "line", "--max-new-tokens", "5", cwd=run)
    assert done.returncode == 0, done.stderr
    assert done.stdout == greedy.stdout
    assert "greedy from generation_config.json" in done.stderr and "repetition_penalty 1.05" in done.stderr


def test_json_has_the_routing(run: Path) -> None:
    arguments = ("generate", "run", "--prompt", "line", "--max-new-tokens", "3", "--json")
    plain, routed = (json.loads(manyhands(*arguments, *more, cwd=run).stdout) for more in ((), ("--show-routing",)))
    assert "routing" not in plain and len(routed["routing"]) == len(routed["token_ids"]) == 3
    for token in routed["routing"]:
        for layer in token.values():
            assert len(layer["experts"]) == len(layer["weights"]) >= 1
    del routed["routing"]
    assert plain == routed and plain["sampling"]["temperature"] == 0.8


def test_eval_as_json_has_what_the_table_shows(run: Path) -> None:
    found = json.loads(manyhands("eval", "run", "--data", "text.txt", "--max-batches", "1", "--json", cwd=run).stdout)
    assert found["model"] == "run" and found["documents"] == 1 and found["bytes"] > 0 and found["sequence_length"] > 0
    assert found["in_front_of_each_document"] is None


def test_control_characters_are_not_printed(run: Path) -> None:
    done = manyhands("generate", "run", "--prompt", "line\x1b[2J\x07", "--max-new-tokens", "1", cwd=run)
    assert done.stdout.startswith("line[2J")
    done = manyhands("generate", "no\x1b[2Jwhere", "--prompt", "x", cwd=run)
    assert "\x1b" not in done.stderr and "no\\x1b[2Jwhere" in done.stderr
