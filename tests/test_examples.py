"""The examples run as they are."""

import runpy
from pathlib import Path

import pytest

from manyhands.train.loop import train

from .small_runs import small_run, write_text

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_drop_in_layer_balances(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "drop_in_layer.py"), run_name="__main__")
    without, balanced = (line.split("MaxVio")[1].split()[0] for line in capsys.readouterr().out.splitlines())
    assert float(balanced) < float(without)


def test_watch_the_router(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path / "run", small_run(write_text(tmp_path), "train.max_steps=2"), quiet=True)
    monkeypatch.setattr("sys.argv", ["watch_the_router.py", str(tmp_path / "run"), "line 5"])
    runpy.run_path(str(EXAMPLES / "watch_the_router.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert lines and all("L1 " in line and "·" in line for line in lines)


def test_watch_transformers(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr("sys.argv", ["watch_transformers.py"])
    runpy.run_path(str(EXAMPLES / "watch_transformers.py"), run_name="__main__")
    *layers, last = capsys.readouterr().out.splitlines()
    assert len(layers) == 2 and all("tokens per expert" in line for line in layers)
    assert float(last.split()[-1]) < 1e-5


def test_train_from_python(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = runpy.run_path(str(EXAMPLES / "train_from_python.py"))
    summary = example["main"](tmp_path / "run", steps=50)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("step 50: loss ") and said[-1].startswith("validation at step 50: ")
    assert summary.valid_loss < 5.0 < 5.7, "of ln 300 to begin with"


def test_moe_in_lightning(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lightning")
    runpy.run_path(str(EXAMPLES / "moe_in_lightning.py"))["main"](steps=60)
    words = capsys.readouterr().out.split()
    assert words[words.index("dead") + 1] == "0" and float(words[-1]) > 0 and float(words[1]) < 5


def test_moe_in_trainer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    runpy.run_path(str(EXAMPLES / "moe_in_trainer.py"))["main"](str(tmp_path), steps=20)
    *_, said = capsys.readouterr().out.splitlines()
    assert said.endswith("reloaded differs 0.0e+00") and float(said.split("bias ")[1].split()[0]) > 0.01


def test_many_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path / "run", small_run(write_text(tmp_path), "train.max_steps=2"), quiet=True)
    monkeypatch.setattr("sys.argv", ["many_prompts.py", str(tmp_path / "run"), "line 5", "a"])
    runpy.run_path(str(EXAMPLES / "many_prompts.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and all("tokens per expert" in line for line in lines[1::2])
    assert len(set(lines[::2])) == 4, "a seed each"
