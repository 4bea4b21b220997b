"""A run directory: one writer, checkpoints that are whole, and the newest valid one always there."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from manyhands.checkpoint import RunDirectory, building, resolve_checkpoint
from manyhands.errors import CheckpointError, RunLocked, StorageError
from manyhands.files import write_atomic

HOLD = """
import sys
from manyhands.checkpoint import RunDirectory
with RunDirectory(sys.argv[1]).lock():
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def run(tmp_path):
    return RunDirectory(tmp_path / "run")


def save(run, *steps):
    for step in steps:
        with building(run.checkpoint_path(step), own=True) as new:
            (new / "state.json").write_text(f"weights {step}")


def damage(run, step):
    path = run.checkpoint_path(step) / "state.json"
    path.write_bytes(path.read_bytes().replace(b"weights", b"weightz"))


def steps(run):
    return [step for step, _ in run.checkpoints()]


def test_layout(run):
    assert run.checkpoint_path(300) == run.path / "checkpoints" / "step-00000300"
    assert run.config_file == run.path / "run.yaml"
    assert run.journal_file == run.path / "journal.jsonl"
    assert run.data_dir == run.path / "data"


def test_a_second_process_is_refused_at_once_until_the_first_is_dead(run):
    command = [sys.executable, "-c", HOLD, str(run.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        try:
            assert first.stdout.readline() == b"locked\n"
            began = time.monotonic()
            with pytest.raises(RunLocked, match=f"in use by process {first.pid};") as caught, run.lock():
                raise AssertionError("locked twice")
            assert time.monotonic() - began < 1
            assert caught.value.exit_code == 1 and "\n" not in str(caught.value)
        finally:
            os.kill(first.pid, signal.SIGKILL)
        first.wait()
    with run.lock():
        assert (run.path / ".lock").read_text() == str(os.getpid())


def test_the_lock_is_released_and_names_its_holder(run):
    with run.lock():
        with pytest.raises(RunLocked, match=f"process {os.getpid()}"), RunDirectory(run.path).lock():
            raise AssertionError("locked twice")
        child = os.open(run.path / ".lock", os.O_RDWR)
        os.close(child)  # unlike POSIX locks, closing another descriptor gives nothing away
        with pytest.raises(RunLocked), RunDirectory(run.path).lock():
            raise AssertionError("locked twice")
    with pytest.raises(ValueError, match="mine"), run.lock():
        raise ValueError("mine")
    with run.lock():
        pass


def test_a_run_directory_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="cannot write"), RunDirectory(tmp_path / "file").lock():
        raise AssertionError("locked a file")


def test_checkpoints_are_the_complete_ones_in_order_of_steps(run):
    assert run.checkpoints() == [] and run.newest_valid() is None
    save(run, 100_000_000, 20, 3)
    (run.checkpoint_path(30)).mkdir()
    (run.checkpoints_dir / "step-last").mkdir()
    (run.checkpoints_dir / "step-00000099").write_text("a file")
    assert run.checkpoints() == [(step, run.checkpoint_path(step)) for step in (3, 20, 100_000_000)]


def test_newest_valid_passes_over_damage_and_says_so(run, caplog):
    save(run, 1, 2, 3)
    assert run.newest_valid() == (3, run.checkpoint_path(3))
    assert caplog.text == ""
    damage(run, 3)
    assert run.newest_valid() == (2, run.checkpoint_path(2))
    assert "step-00000003" in caplog.text and "'state.json'" in caplog.text
    damage(run, 2)
    damage(run, 1)
    with pytest.raises(CheckpointError, match="all 3 checkpoints are damaged"):
        run.newest_valid()


def test_retain_keeps_the_newest_valid_ones(run):
    save(run, 1, 2, 3, 4)
    run.retain(5)
    assert steps(run) == [1, 2, 3, 4]
    run.retain(2)
    assert steps(run) == [3, 4]
    assert sorted(path.name for path in run.checkpoints_dir.iterdir()) == ["step-00000003", "step-00000004"]


def test_retain_never_deletes_the_newest_valid_one(run):
    save(run, 1, 2, 3, 4)
    damage(run, 4)
    damage(run, 3)
    run.retain(1)
    assert run.newest_valid() == (2, run.checkpoint_path(2))
    assert not run.checkpoint_path(1).exists()
    damage(run, 2)
    run.retain(1)
    assert steps(run) == [2, 3, 4]  # nothing is valid: nothing is deleted


def test_retain_goes_on_after_a_failed_deletion(run, monkeypatch, caplog):
    save(run, 1, 2, 3, 4)
    rmdir = Path.rmdir

    def fail_first(path):
        if path == run.checkpoint_path(1):
            raise OSError(errno.EBUSY, "Device or resource busy")
        rmdir(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rmdir", fail_first)
        run.retain(2)
    assert "step-00000001" in caplog.text and "busy" in caplog.text
    assert run.checkpoint_path(1).exists()  # but without its manifest, so nobody takes it for a checkpoint
    assert steps(run) == [3, 4]
    assert not run.checkpoint_path(2).exists()
    run.clean_partial()
    assert not run.checkpoint_path(1).exists()


def test_clean_partial_clears_what_the_dead_left_and_nothing_else(run):
    save(run, 1, 2)
    write_atomic(run.journal_file, "{}\n")
    write_atomic(run.data_dir / "train.npy", b"1")
    (run.path / "notes.partial-1").write_text("mine")
    before = sorted(run.path.rglob("*"))
    (run.checkpoints_dir / ".step-00000003.partial-12345").mkdir()
    (run.checkpoints_dir / ".step-00000003.partial-12345" / "state.json").write_text("half")
    run.checkpoint_path(4).mkdir()
    (run.checkpoint_path(4) / "state.json").write_text("half deleted")
    (run.data_dir / ".train.npy.partial-77").write_text("half")
    (run.path / ".run.yaml.partial-78").write_text("half")
    run.checkpoint_path(2).rename(run.checkpoints_dir / ".step-00000002.replaced-79")
    run.clean_partial()
    assert sorted(run.path.rglob("*")) == before
    assert run.newest_valid() == (2, run.checkpoint_path(2))


def test_a_re_save_over_a_left_over_checkpoint(run):
    save(run, 3)
    (run.checkpoint_path(3) / "manifest.json").unlink()
    save(run, 3)
    assert run.newest_valid() == (3, run.checkpoint_path(3))
    assert [path.name for path in run.checkpoints_dir.iterdir()] == ["step-00000003"]


def test_what_a_person_may_pass(run, tmp_path):
    save(run, 1, 2)
    assert resolve_checkpoint(run.path) == run.checkpoint_path(2)
    assert resolve_checkpoint(str(run.checkpoint_path(1))) == run.checkpoint_path(1)
    damage(run, 2)
    assert resolve_checkpoint(run.path) == run.checkpoint_path(1)
    with pytest.raises(CheckpointError, match="SHA-256"):
        resolve_checkpoint(run.checkpoint_path(2))


def test_what_a_person_may_not_pass(run, tmp_path):
    save(run, 1)
    (run.checkpoint_path(1) / "manifest.json").unlink()
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    wrong = {
        tmp_path / "nowhere": "does not exist",
        tmp_path / "file": "not a directory",
        tmp_path / "empty": "an empty directory",
        run.path: "a run without a complete checkpoint",
        run.checkpoint_path(1): "not a checkpoint, or an incomplete one; it holds state.json;",
    }
    for path, what in wrong.items():
        with pytest.raises(CheckpointError) as caught:
            resolve_checkpoint(path)
        assert str(caught.value).startswith(f"{path}: {what}")
        assert "expected a model" in str(caught.value) and "\n" not in str(caught.value)
