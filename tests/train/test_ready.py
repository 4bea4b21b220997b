"""What is wrong with a run is said before any work is done, in one line that names the field."""

from pathlib import Path

import pytest
import torch

from manyhands.errors import ConfigError
from manyhands.generate.evaluate import trained_length
from manyhands.train import loop, preparing

from ..small_runs import manyhands, small_run, write_text

BAD = {
    "train.device=cuda": r"train\.device = 'cuda': PyTorch finds no CUDA device",
    "train.experts_implementation=nativ": "experts_implementation = 'nativ': did you mean 'native'",
    "train.trackers=[trackio]": "train.trackers: trackio is not installed; run: pip install trackio",
    "model.vocab_size=200": r"model\.vocab_size = 200: a byte-level vocabulary needs 257",
    "data.tokenizer=no/such.json": r"data\.tokenizer = 'no/such.json': there is no such file",
    "model.moe.moe_intermediate_size=16777216": r"billion parameters, which need .* GB and more to train",
}


@pytest.mark.parametrize("change", BAD)
def test_before_any_work(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(preparing, "prepare", lambda *args: pytest.fail("it began to work"))
    monkeypatch.setattr("manyhands.train.ready.installed_memory", lambda: 1 << 30)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=BAD[change]) as caught:
        loop.train(tmp_path / "run", small_run(tmp_path, change), quiet=True)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("seed", [1 << 64, -(1 << 63) - 1])
def test_a_seed_that_generators_do_not_take(seed: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"train\.seed = {seed}: must be "):
        small_run(tmp_path, f"train.seed={seed}")


@pytest.mark.parametrize("seed", [(1 << 64) - 1, -(1 << 63)])
def test_the_outermost_seeds_train(seed: int, tmp_path: Path) -> None:
    run = small_run(write_text(tmp_path), f"train.seed={seed}", "train.max_steps=1")
    assert loop.train(tmp_path / "run", run, quiet=True).steps == 1


def test_eval_takes_the_length_of_training(tmp_path: Path) -> None:
    run = small_run(write_text(tmp_path), "train.sequence_length=24", "train.max_steps=1")
    done = loop.train(tmp_path / "run", run, quiet=True)
    assert trained_length(tmp_path / "run") == trained_length(done.checkpoint) == 24
    assert trained_length(tmp_path) is None and trained_length("some/name") is None
    said = manyhands("eval", str(tmp_path / "run"), "--data", str(tmp_path / "text.txt"))
    assert "sequences of 24 tokens" in said.stdout
