"""`manyhands sweep`: what a file asks for, run after run; resumed, interrupted, one that fails."""

import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from manyhands.checkpoint.runs import RunDirectory
from manyhands.compare.run import Run
from manyhands.compare.sweep import state_of, sweep
from manyhands.compare.sweep_file import read_sweep
from manyhands.errors import ConfigError, Interrupted
from manyhands.train import loop

from ..forked import ForkedPopen
from ..small_runs import SMALL, manyhands
from .test_comparison import texts

SMALLEST = [*SMALL[:-1], "train.max_steps=3", "data.valid_fraction=0.3"]


@pytest.fixture(autouse=True)
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are processes of their own, but do not import torch again."""
    monkeypatch.setattr(subprocess, "Popen", ForkedPopen)


def write(folder: Path, text: str, more: str = "") -> Path:
    lines = "".join(f"  - {change}\n" for change in [*SMALLEST, f"data.sources=['{texts(folder / 'texts')}']"])
    file = folder / "rates.yaml"
    file.write_text(f"preset: tiny\nset:\n{lines}{more}{text}\n")
    return file


def test_grid_and_list_times_seeds(tmp_path: Path) -> None:
    grid = (
        "grid: {optim.lr: [0.001, 0.002], model.moe.router.score: [softmax]}\nruns: {plain: [], calm: [optim.eps=0.1]}"
    )
    planned = read_sweep(write(tmp_path, f"seeds: [3, 5]\n{grid}"))
    assert [each.name for each in planned][:3] == [
        "plain-lr=0.001-score=softmax-seed3",
        "plain-lr=0.001-score=softmax-seed5",
        "plain-lr=0.002-score=softmax-seed3",
    ]
    assert len(planned) == 8 and {p.run.train.seed for p in planned} == {3, 5}
    assert [p.run.optim.lr for p in planned] == [0.001, 0.001, 0.002, 0.002] * 2
    assert [p.run.optim.eps for p in planned][::4] == [1e-8, 0.1]


BAD = {
    "no source": ("seeds: 2", "one of preset"),
    "unknown field": ("preset: tiny\nseed: 2", "seed"),
    "bad change": ("preset: tiny\nruns: {a: [optim.lr=hot]}", "optim.lr"),
    "not a change": ("preset: tiny\nset: [optim.lr]", "section.key=value"),
    "seed in the grid": ("preset: tiny\ngrid: {train.seed: [1]}", "seeds says which"),
    "twice": ("preset: tiny\nset: [optim.lr=1]\ngrid: {optim.lr: [1, 2]}", "in grid, and in"),
    "same run": ("preset: tiny\nruns: {a: [], b: []}", "the same run"),
    "endless": ("preset: tiny\nseeds: 1000\ngrid: {optim.lr: [1, 2]}", "at most 1,000"),
    "key twice": ("preset: tiny\npreset: tiny", "given twice"),
    "no mapping": ("- preset", "expected preset"),
    "empty grid": ("preset: tiny\ngrid: {optim.lr: []}", "optim.lr"),
    "same seed": ("preset: tiny\nseeds: [1, 1]", "given twice"),
    "unknown preset": ("preset: tinny", "did you mean"),
}


def test_a_bad_file_is_refused_before_anything_runs(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    for what, (text, said) in BAD.items():
        file.write_text(text)
        with pytest.raises(ConfigError, match=rf"bad\.yaml.*{said}"):
            read_sweep(file)
            pytest.fail(what)
    done = manyhands("sweep", str(tmp_path / "none.yaml"))
    assert done.returncode == 2 and "cannot be read" in done.stderr and done.stderr.count("\n") == 1


def test_a_sweep(tmp_path: Path) -> None:
    """Two at a time: one that fails is named and stops no other; the second time what is finished is skipped."""
    text = "runs:\n  low: [optim.lr=0.001]\n  bad: [\"data.sources=['nowhere.txt']\"]\n  high: [optim.lr=0.004]"
    file, out = write(tmp_path, text), tmp_path / "out"
    loop.train(out / "low-seed0", read_sweep(file)[0].run, quiet=True)
    before = (out / "low-seed0" / "journal.jsonl").read_bytes()
    done = manyhands("sweep", str(file), "--out", str(out), "--parallel", "2", "--json")
    assert done.returncode == 1 and "1 of 3 runs failed: bad-seed0: " in done.stderr and "nowhere.txt" in done.stderr
    found = json.loads(done.stdout)
    assert [c["fields"]["optim.lr"] for c in found["configurations"]] == [0.001, 0.004]
    assert (out / "compare.html").is_file() and Run.open(out / "high-seed0").ended
    listed = json.loads(manyhands("sweep", str(file), "--out", str(out), "--dry-run", "--json").stdout)
    assert [row["state"] for row in listed] == ["finished", "to do", "finished"]
    assert listed[0]["command"][:4] == ["manyhands", "train", "--preset", "tiny"]
    file.write_text(file.read_text().replace("  bad: [\"data.sources=['nowhere.txt']\"]\n", ""))
    done = manyhands("sweep", str(file), "--out", str(out))
    assert done.returncode == 0 and "2 of 2 runs are finished" in done.stderr and "lr 0.004" in done.stdout
    assert (out / "low-seed0" / "journal.jsonl").read_bytes() == before


def test_a_signal_saves_and_the_sweep_goes_on(tmp_path: Path) -> None:
    file, out = write(tmp_path, "seeds: 2", '  - "train.max_steps=100000"\n'), tmp_path / "out"
    planned, journal = read_sweep(file), out / "seed0" / "journal.jsonl"

    def stop() -> None:
        for _ in range(600):
            if journal.is_file() and b'"kind":"step"' in journal.read_bytes():
                break
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(Interrupted, match="sweep again") as stopped:
        sweep(planned, out)
    thread.join()
    assert stopped.value.exit_code == 143 and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert RunDirectory(out / "seed0").checkpoints() and not (out / "seed1").exists()
    assert state_of(planned[0], out / "seed0") == "to continue"
