"""Shared by the tests of tuning: a small model, and text that it has not seen."""

from pathlib import Path

import pytest

from manyhands.train import loop

from ..small_runs import small_run, write_text


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the tiny preset: layer 0 is dense, layers 1 and 2 have 8 experts."""
    folder = tmp_path_factory.mktemp("base")
    changes = ["model.num_hidden_layers=3", "model.moe.n_shared_experts=0"]
    loop.train(folder / "run", small_run(write_text(folder), *changes), quiet=True)
    return folder / "run"


@pytest.fixture(scope="session")
def other_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of another kind than the base's."""
    path = tmp_path_factory.mktemp("other") / "other.txt"
    path.write_text("".join(f"{i % 31} bottles hang on wall {'xyz'[i % 3]}\n" for i in range(600)))
    return path
