import io
import logging
import re
import subprocess
import sys

import pytest

from manyhands.train.screen import Screen

START = {"kind": "start", "step": 0, "parameters": 9_312_000, "active_parameters": 3_104_000}
START |= {"num_experts": 4, "num_experts_per_tok": 2, "sparse_layers": [1, 2]}
EVAL = {"kind": "eval", "step": 5, "valid_loss": 2.0, "valid_bits_per_byte": 1.25, "valid_perplexity": 7.39}


def step(number: int, **more: object) -> dict:
    layer = {"load": [0.0, 0.25, 0.5, 0.25], "max_vio": 1.0, "dead": 1}
    record = {"kind": "step", "step": number, "loss": 3.21, "bits_per_byte": 2.31, "lr": 1e-3, "grad_norm": 0.5}
    record |= {"tokens_per_s": 5912.0, "elapsed": 0.5 * number, "skipped": False}
    return record | {"moe": {"1": layer, "2": layer | {"max_vio": 0.2, "dead": 0}}} | more


class Terminal(io.TextIOWrapper):
    """A terminal of 100 columns that remembers what it was sent."""

    def __init__(self, encoding: str = "utf-8") -> None:
        self.sent = io.BytesIO()
        super().__init__(self.sent, encoding=encoding, write_through=True)

    def isatty(self) -> bool:
        return True

    @property
    def text(self) -> str:
        return re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", self.sent.getvalue().decode())


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "30")
    monkeypatch.delenv("NO_COLOR", raising=False)


def test_plain_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr("manyhands.train.screen._PLAIN_SECONDS", 0.0)
    with Screen("quickstart", 480, file=out) as screen:
        screen.start(START)
        for number in (119, 120):
            screen.step(step(number))
        screen.eval(EVAL)
        screen.note("checkpoint [saved]")
    assert out.getvalue().splitlines() == [
        "quickstart",
        "9.31M parameters, 3.1M active per token · 4 experts, 2 per token",
        "step 119/480  loss 3.210  bpb 2.310  5.9k tok/s  maxvio 1.00 dead 1",
        "step 120/480  loss 3.210  bpb 2.310  5.9k tok/s  3m00s left  maxvio 1.00 dead 1",
        "validation at step 5:  loss 2.000  bits/byte 1.250  perplexity 7.39",
        "checkpoint [saved]",
    ]


def test_plain_lines_are_few_and_the_last_step_is_always_there() -> None:
    out = io.StringIO()
    with Screen("t", 1000, file=out) as screen:
        for number in range(1, 500):
            screen.step(step(number))
    assert [line.split()[1] for line in out.getvalue().splitlines()[1:]] == ["1/1000", "499/1000"]


def test_the_live_view_shows_every_layer_and_the_last_validation() -> None:
    terminal = Terminal()
    with Screen("quickstart", 10, file=terminal) as screen:
        screen.start(START)
        screen.set_max_steps(20)
        screen.step(step(4))
        screen.step(step(5, skipped=True))
        screen.eval(EVAL)
    last = terminal.text[terminal.text.rindex("quickstart") :]
    assert "9.31M parameters, 3.1M active" in last and "5/20" in last and "8s left" in last
    assert re.search(r"layer 1\s+▁▄█▄\s+MaxVio 1.00\s+dead 1", last)
    assert re.search(r"layer 2\s+▁▄█▄\s+MaxVio 0.20\s+dead 0", last)
    assert "bits/byte 1.250" in last and "5.9k" in last and "update skipped" in last


def test_a_low_terminal_shows_the_worst_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINES", "9")
    terminal = Terminal()
    with Screen("t", 10, file=terminal) as screen:
        screen.step(step(4))
    assert "layer 1" in terminal.text and "layer 2" not in terminal.text and "and 1 calmer layers" in terminal.text


@pytest.mark.parametrize("kind", [io.BytesIO, Terminal])
def test_ascii_where_the_encoding_has_no_blocks(kind: type) -> None:
    out = (
        Terminal("ascii") if kind is Terminal else io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    )
    with Screen("t", 10, file=out) as screen:
        screen.start(START)
        screen.step(step(4, grad_norm=None, loss=None))
        assert not screen.dark
    if kind is Terminal:
        assert re.search(r"layer 1\s+_=#=\s+MaxVio", out.text)


def test_a_dense_run_has_no_strips() -> None:
    terminal, out = Terminal(), io.StringIO()
    for file in (terminal, out):
        with Screen("t", 10, file=file) as screen:
            screen.start({"parameters": 1_000_000, "sparse_layers": []})
            screen.step(step(4, moe={}))
            assert not screen.dark
    assert "layer" not in terminal.text and "maxvio" not in out.getvalue() and "1M parameters" in out.getvalue()


def test_quiet_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with Screen("t", 10, quiet=True) as screen:
        screen.start(START)
        screen.step(step(1))
        screen.note("n")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("terminal", [True, False])
def test_a_broken_display_goes_dark_and_gives_stdout_back(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Terminal):
        def isatty(self) -> bool:
            return terminal

        def write(self, text: str) -> int:
            if "3.21" in text:
                raise BrokenPipeError(32, "Broken pipe")
            return super().write(text)

    before = sys.stdout
    with caplog.at_level(logging.WARNING), Screen("t", 10, file=Broken()) as screen:
        screen.step(step(1))
        assert screen.dark and sys.stdout is before
        screen.step(step(2))
        screen.note("gone")
    assert len(caplog.records) == 1 and "nobody reads" in caplog.text


def test_training_outlives_its_reader() -> None:
    """`manyhands train | head -1`: rich alone would exit."""
    code = (
        "import sys; from manyhands.train.screen import Screen\n"
        "with Screen('t', 10) as screen:\n"
        "    sys.stdin.readline()\n"
        "    screen.note('x'); screen.note('y')\n"
        "print('z', flush=True); sys.exit(7)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin is not None and child.stdout is not None
    child.stdout.readline()
    child.stdout.close()
    child.stdin.write(b"\n")
    child.stdin.close()
    assert child.wait(timeout=60) == 7


def test_a_record_without_what_is_shown_does_not_end_training(caplog: pytest.LogCaptureFixture) -> None:
    with Screen("t", 10, file=io.StringIO()) as screen:
        screen.step({"kind": "step"})
    assert screen.dark and "display turned off" in caplog.text


def test_errors_of_training_pass_through() -> None:
    with pytest.raises(ZeroDivisionError), Screen("t", 10, file=Terminal()):
        raise ZeroDivisionError


def test_the_figures_are_one_line_of_eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    terminal = Terminal()
    with Screen("t", 10, file=terminal) as screen:
        screen.step(step(4, loss=12.345, bits_per_byte=12.345, tokens_per_s=123_456.0, grad_norm=9.87, epochs=12.34))
    last = terminal.text[terminal.text.rindex("loss 12.345") :].splitlines()[0]
    assert "tok/s 123k" in last and last.rstrip().endswith("epoch 12.34")
