"""Small runs for tests."""

import contextlib
import io
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from manyhands.cli.main import main
from manyhands.config import RunConfig
from manyhands.config.load import load_preset
from manyhands.train import loop
from manyhands.train.step import StepResult

SMALL = [
    "model.vocab_size=300",
    "model.hidden_size=32",
    "model.intermediate_size=64",
    "model.max_position_embeddings=32",
    "model.attention.num_attention_heads=2",
    "model.attention.head_dim=16",
    "model.moe.moe_intermediate_size=16",
    "train.sequence_length=32",
    "train.batch_size=4",
    "train.max_steps=8",
]


def write_text(folder: Path, lines: int = 800) -> Path:
    """A text with something to learn in it."""
    path = folder / "text.txt"
    path.write_text("".join(f"line {i % 97}: {'abcde'[i % 5] * 3} the hands are many\n" for i in range(lines)))
    return path


def small_run(text: Path, *changes: str) -> RunConfig:
    """The tiny preset, smaller still, on `text`."""
    return load_preset("tiny", [*SMALL, f"data.sources=['{text}']", *changes])


@dataclass(frozen=True)
class Done:
    """What a call of the command line left behind."""

    returncode: int
    stdout: str
    stderr: str


def manyhands(*arguments: str, stdin: str = "", cwd: Path | None = None) -> Done:
    """The command line, in this process: a process of its own would import torch again for every call."""
    out, err = io.StringIO(), io.StringIO()
    before = sys.argv, sys.stdin, os.getcwd()
    sys.argv, sys.stdin = ["manyhands", *arguments], io.StringIO(stdin)
    try:
        os.chdir(cwd or before[2])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 0 if left.code is None else 1
    finally:
        sys.argv, sys.stdin = before[:2]
        os.chdir(before[2])
    return Done(code, out.getvalue(), err.getvalue())


def steps_of_a_second(monkeypatch: pytest.MonkeyPatch, seconds: float = 1.0) -> list[float]:
    """A clock that only training steps move."""
    clock, real = [0.0], loop.train_step

    def timed(*args: Any) -> StepResult:
        clock[0] += seconds
        return real(*args)

    monkeypatch.setattr(loop, "train_step", timed)
    monkeypatch.setattr(loop.time, "perf_counter", lambda: clock[0])
    return clock
