import json
import resource
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from manyhands.config.load import load_preset
from manyhands.errors import DataError, StorageError
from manyhands.moe import LoadCounter
from manyhands.plan.load_file import read_load
from manyhands.trace.journal import Journal, flatten, last_steps, of_layer, read_journal


def step(number: int, loss: float, **more: object) -> dict:
    return {"kind": "step", "step": number, "loss": loss, **more}


def write_lines(path: Path, *lines: dict | str) -> None:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))


def test_what_is_written_is_returned_and_read(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        first = journal.write("start", step=0, parameters=7, sparse_layers=[1, 2])
        second = journal.write("step", step=1, loss=0.1 + 0.2, path=Path("a/b"), skipped=False, aux_loss=None)
        assert path.read_text().count("\n") == 2  # there before the file is closed
    assert read_journal(path) == [first, second]
    assert second["loss"] == 0.1 + 0.2 and second["path"] == "a/b"


def test_tensors_become_numbers_and_not_a_number_becomes_null(tmp_path: Path) -> None:
    with Journal(tmp_path / "j") as journal:
        record = journal.write(
            "step",
            step=1,
            loss=torch.tensor(2.5),
            grad_norm=float("inf"),
            moe={1: {"load": torch.tensor([1 / 3, float("nan")]), "dead": torch.tensor(0)}},
        )
    assert record["loss"] == 2.5 and record["grad_norm"] is None
    assert record["moe"] == {"1": {"load": [0.333333, None], "dead": 0}}
    assert read_journal(tmp_path / "j") == [record]


def test_a_torn_last_line_is_left_out_and_removed_before_the_next_record(tmp_path: Path) -> None:
    path = tmp_path / "j"
    whole = json.dumps(step(1, 1.0)) + "\n"
    for cut in range(1, len(whole) - 1):
        path.write_text(whole + whole[:cut])
        assert len(read_journal(path)) == 1
        with Journal(path) as journal:
            journal.write("step", step=2, loss=2.0)
        assert [record["step"] for record in read_journal(path)] == [1, 2]


def test_a_last_line_that_only_lacks_its_newline_counts(tmp_path: Path) -> None:
    path = tmp_path / "j"
    path.write_text(json.dumps(step(1, 1.0)))
    assert len(read_journal(path)) == 1
    with Journal(path) as journal:
        journal.write("step", step=2, loss=2.0)
    assert [record["step"] for record in read_journal(path)] == [1, 2]


@pytest.mark.parametrize("bad", ["{", "[1]", '{"kind":"step"}', "", '{"kind":3,"step":1}'])
def test_a_bad_line_in_the_middle_is_an_error_with_its_number(tmp_path: Path, bad: str) -> None:
    write_lines(tmp_path / "j", step(1, 1.0), bad, step(2, 1.0))
    with pytest.raises(DataError, match="line 2: not a journal record"):
        read_journal(tmp_path / "j")


def test_a_missing_journal(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_journal(tmp_path / "none")


def test_a_resumed_run_overwrites_what_the_killed_one_did_after_its_checkpoint(tmp_path: Path) -> None:
    start = {"kind": "start", "step": 0}
    evaluation = {"kind": "eval", "step": 4, "valid_loss": 9.0}
    checkpoint = {"kind": "checkpoint", "step": 2}
    write_lines(tmp_path / "j", start, step(1, 1.0), step(2, 1.1), checkpoint, step(3, 8.0), step(4, 8.1), evaluation)
    with Journal(tmp_path / "j") as journal:
        again = journal.write("start", step=2)
        third = journal.write("step", step=3, loss=3.0)
    found = read_journal(tmp_path / "j")
    assert found == [start, step(1, 1.0), step(2, 1.1), checkpoint, again, third]


def test_names_of_metrics() -> None:
    record = step(3, 2.0, aux_loss=None, skipped=True, moe={"3": {"max_vio": 0.5, "load": [0.5, 0.5], "dead": 0}})
    assert flatten(record) == {
        "train/loss": 2.0,
        "train/skipped": 1.0,
        "moe/layer03/max_vio": 0.5,
        "moe/layer03/dead": 0.0,
    }
    assert flatten({"kind": "eval", "step": 3, "valid_loss": 1.5, "tokens": 9}) == {
        "valid/loss": 1.5,
        "valid/tokens": 9.0,
    }
    assert flatten({"kind": "end", "step": 3, "elapsed": 1.0}) == {}


def test_a_full_disk_is_a_storage_error_and_leaves_no_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "j"
    with Journal(path) as journal:
        first = journal.write("step", step=1, loss=1.0)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, before[1]))
        try:
            with pytest.raises(StorageError, match="the record was not written"):
                journal.write("step", step=2, loss=2.0)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert path.read_text().endswith("\n")
        third = journal.write("step", step=3, loss=3.0)
    assert read_journal(path) == [first, third]


def test_the_last_steps_are_steps_not_records() -> None:
    steps = [{"step": step} for step in range(10, 201, 10)]
    assert [record["step"] for record in last_steps(steps, 50)] == [160, 170, 180, 190, 200]
    assert last_steps(steps[-1:], 5) == [{"step": 200}] and last_steps([], 5) == []


def test_a_plan_reads_the_loads_that_a_run_writes(tmp_path: Path) -> None:
    """`plan` lies below this room and reads the two names it needs by itself."""
    run = load_preset("tiny")
    E = run.model.moe.router.num_experts if run.model.moe else 0
    counter = LoadCounter.empty(E)
    counter.counts = torch.arange(E)
    with Journal(tmp_path / "run.jsonl") as journal:
        moe = {str(layer): asdict(counter.summary()) for layer in run.model.sparse_layers}
        record = journal.write("step", step=1, loss=1.0, moe=moe)
    shares = read_load(tmp_path / "run.jsonl", run.model)
    assert shares[0] == pytest.approx([e / sum(range(E)) for e in range(E)], abs=1e-6)
    assert of_layer(record, str(run.model.sparse_layers[0]))["load"] == pytest.approx(shares[0])
    assert of_layer({"kind": "eval"}, "1") == {}
