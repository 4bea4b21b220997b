"""-q, -v, --debug of every verb; mistakes in one line; standard streams that are closed, full, or left by a reader."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer

from manyhands.checkpoint.model import save
from manyhands.cli.loudness import LOG
from manyhands.cli.main import app
from manyhands.config import AttentionConfig, ModelConfig, MoEConfig, RouterConfig
from manyhands.models import Decoder, init_weights
from manyhands.text import Tokenizer

from ..small_runs import manyhands
from .test_usual import commands

COMMAND = [sys.executable, "-W", "error", "-m", "manyhands"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a model that nobody trained."""
    folder = tmp_path_factory.mktemp("loud")
    tokenizer = Tokenizer.train(["a few words that are enough"], vocab_size=257)
    decoder = Decoder(
        ModelConfig(
            vocab_size=257,
            hidden_size=16,
            max_position_embeddings=64,
            attention=AttentionConfig(num_attention_heads=1, head_dim=16),
            moe=MoEConfig(router=RouterConfig(num_experts=4, num_experts_per_tok=2), moe_intermediate_size=16),
        )
    )
    init_weights(decoder, seed=0)
    save(decoder, folder / "model", tokenizer)
    return folder / "model"


def test_three_levels(model: Path) -> None:
    asked = ("generate", str(model), "--prompt", "a", "--max-new-tokens", "2", "--temperature", "0")
    usual, less, more = (manyhands(*asked, *flag) for flag in ((), ("-q",), ("-v",)))
    assert usual.stdout == less.stdout == more.stdout and usual.returncode == 0
    assert less.stderr == ""
    [line] = usual.stderr.splitlines()
    assert line.startswith(f"{model}: ") and "parameters" in line and "float32; loaded in" in line
    for part in (line.split("; loaded")[0], "are as the manifest says", "torch " + torch.__version__, "parts", "took "):
        assert part in more.stderr
    assert manyhands(*asked, "--json").stderr == ""  # a program reads no remarks
    assert "took " in manyhands(*asked, "--json", "-v").stderr
    assert manyhands("-q", *asked).stderr == "" and manyhands("-v", *asked, "-q").stderr == ""


def test_the_level_is_that_of_one_call() -> None:
    before = LOG.level, list(LOG.handlers)
    assert manyhands("presets", "-v").returncode == 0 and manyhands("presets", "--nothing").returncode == 2
    assert (LOG.level, LOG.handlers) == before


def test_every_verb_has_them() -> None:
    for name, command in commands().items():
        context = command.context_class(command, info_name=name)
        flags = {flag for parameter in command.get_params(context) for flag in parameter.opts}
        assert {"-q", "--quiet", "-v", "--verbose", "--debug"} <= flags, name
        assert "Of every verb:" in command.get_help(context), name
    group = typer.main.get_command(app)
    assert {"-q", "-v", "--debug"} <= {flag for p in group.get_params(typer.Context(group)) for flag in p.opts}


MISTAKES = {
    "tran": "there is no command 'tran'; did you mean 'train'?",
    "trace shw": "trace: there is no command 'shw'; did you mean 'show'?",
    "trace": "trace: which command: show, import, export?",
    "train --presett x": "train: there is no option --presett; did you mean --preset?",
    "generate x --temprature 1": "generate: there is no option --temprature; did you mean --temperature?",
    "generate x -z": "generate: there is no option -z",
    "generate": "generate: missing argument",
    "generate x --prompt": "generate: option '--prompt' requires an argument",
    "convert a b --type q8": "did you mean 'q8_0'?",
    "tune a --data b --method loraa": "did you mean 'lora'?",
    "serve x --port 99999999": "serve: --port: ",
}


@pytest.mark.parametrize("typed", MISTAKES)
def test_a_command_line_that_is_none_is_one_line(typed: str) -> None:
    done = manyhands(*typed.split())
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("manyhands: ") and MISTAKES[typed] in done.stderr and " --help)" in done.stderr


def test_an_empty_standard_input_is_a_mistake(model: Path) -> None:
    for text in ("", "\n"):
        done = manyhands("generate", str(model), stdin=text)
        assert done.returncode == 2 and "standard input is empty" in done.stderr
    done = manyhands("generate", str(model), "--prompt", "", "--max-new-tokens", "1", "--json")
    assert done.returncode == 0 and len(json.loads(done.stdout)["token_ids"]) == 1


class Full(io.StringIO):
    """A disk that is full."""

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


class Left(io.StringIO):
    """A pipe whose reader left."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize(("stream", "code", "said"), [(Full, 1, "No space left on device (--debug"), (Left, 141, "")])
def test_output_that_cannot_be_written(
    stream: type[io.StringIO], code: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from manyhands.cli.main import main

    monkeypatch.setattr(sys, "argv", ["manyhands", "presets"])
    err = io.StringIO()
    with contextlib.redirect_stdout(stream()), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == code and said in err.getvalue() and err.getvalue().count("\n") == (1 if said else 0)


def test_closed_streams_are_stood_in_for(tmp_path: Path) -> None:
    """In a process of its own, whose numbers 0, 1 and 2 are free: what is opened later must not get them."""
    code = "import os; [os.close(n) for n in (0, 1, 2)]; os.execv(os.sys.executable, os.sys.argv[1:])"
    look = (
        "import sys; from manyhands.cli.endings import open_streams; open_streams(); "
        f"f = open({str(tmp_path / 'found')!r}, 'w'); f.write(f'{{f.fileno() > 2}} {{sys.stdin.read()!r}}'); "
        "print('nobody hears'); f.close()"
    )
    done = subprocess.run([sys.executable, "-c", code, sys.executable, "-c", look], check=False)
    assert done.returncode == 0 and (tmp_path / "found").read_text() == "True ''"


def test_head_takes_what_it_wants() -> None:
    """Through a real pipe, which Python flushes when it ends."""
    reading, writing = os.pipe()
    os.close(reading)
    with subprocess.Popen([*COMMAND, "presets"], stdout=writing, stderr=subprocess.PIPE, text=True) as process:
        os.close(writing)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 141 and err == ""


def test_ctrl_c_while_modules_are_imported() -> None:
    """The process ends by the signal itself, so that a shell's loop ends too; no traceback."""
    program = (
        "import os, signal, sys\n"
        "from manyhands.__main__ import main\n"
        "class Pressed:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'typer': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Pressed())\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program, "models"], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGINT and done.stdout == done.stderr == ""
