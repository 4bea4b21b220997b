"""Small runs for tests."""

import os
import subprocess
import sys
from pathlib import Path

from manyhands.config import RunConfig
from manyhands.config.load import load_preset

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


def manyhands(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    """The command line in its own process."""
    command = [sys.executable, "-W", "error", "-m", "manyhands", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    settings = {"capture_output": True, "text": True, "timeout": 120, "env": environment} | options
    return subprocess.run(command, check=False, **settings)  # type: ignore[call-overload, no-any-return]
