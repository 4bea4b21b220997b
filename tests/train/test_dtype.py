"""`train.dtype: auto` is decided once: by the machine a run begins on, and kept by every other."""

from pathlib import Path

import pytest

from manyhands.config.load import load_run
from manyhands.trace.journal import read_journal
from manyhands.train import dtype, loop
from manyhands.train.dtype import settle_dtype

from ..small_runs import small_run, write_text


def on(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    """A machine where bfloat16 is faster, or is not."""
    monkeypatch.setattr(dtype, "bf16_trains_faster", lambda width: fast)


@pytest.mark.parametrize(("fast", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_auto_is_what_is_faster_here(
    fast: bool, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(monkeypatch, fast)
    assert settle_dtype(small_run(tmp_path), None)[0].train.dtype == expected
    for named in ("float32", "bfloat16"):
        assert settle_dtype(small_run(tmp_path, f"train.dtype={named}"), None)[0].train.dtype == named


def test_a_file_that_says_auto_was_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, True)
    old = small_run(tmp_path)
    assert old.train.dtype == "auto"
    run, before = settle_dtype(old, old)
    assert before is not None and (run.train.dtype, before.train.dtype) == ("float32", "float32")


def test_a_run_keeps_its_dtype_on_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, out = write_text(tmp_path), tmp_path / "run"
    on(monkeypatch, True)
    loop.train(out, small_run(text, "train.max_steps=2"), quiet=True)
    assert load_run(out / "run.yaml").train.dtype == "bfloat16"
    on(monkeypatch, False)
    loop.train(out, small_run(text, "train.max_steps=3"), quiet=True)
    loop.train(tmp_path / "again", load_run(out / "run.yaml"), quiet=True)
    for directory in (out, tmp_path / "again"):
        starts = [record for record in read_journal(directory / "journal.jsonl") if record["kind"] == "start"]
        assert {record["dtype"] for record in starts} == {"bfloat16"}
