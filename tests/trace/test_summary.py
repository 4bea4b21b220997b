"""What `trace show` says, and what `trace export` writes, against the arrays themselves."""

import csv
import json

import numpy as np
import pytest
from typer.testing import CliRunner

from manyhands.cli.main import app
from manyhands.errors import DataError, UserError
from manyhands.trace.export import export_csv, export_npy
from manyhands.trace.recording import Trace
from manyhands.trace.summary import summary
from tests.trace.traces import record


@pytest.mark.parametrize("part_bytes", [1 << 20, 300, 60])
def test_summary_is_the_steps(tmp_path, part_bytes):
    passes = record(tmp_path / "t", E=12, part_bytes=part_bytes)
    about = summary(Trace.open(tmp_path / "t"))
    assert (about.tokens, about.sequences, about.steps, about.known_tokens) == (40, 1, 21, 40)
    assert about.phases == {"prefill": 20, "decode": 20}
    for one in about.layers:
        counts = sum(p[one.layer].expert_counts() for p in passes).double()
        distinct = [len(p[one.layer].expert_ids.unique()) for p in passes]
        assert one.load_max_over_mean == pytest.approx(float(counts.max() / counts.mean()))
        assert one.dead == int((counts == 0).sum()) and one.distinct_per_step == pytest.approx(np.mean(distinct))


def test_exports(tmp_path):
    record(tmp_path / "t", part_bytes=300)
    trace = Trace.open(tmp_path / "t")
    export_npy(trace, tmp_path / "ids.npy")
    ids = np.concatenate([part.expert_ids for part in trace.parts()])
    assert np.array_equal(np.load(tmp_path / "ids.npy"), ids)
    export_npy(trace, tmp_path / "step.npy", "step")
    assert np.load(tmp_path / "step.npy").tolist() == [0] * 20 + list(range(1, 21))
    export_csv(trace, tmp_path / "t.csv")
    with open(tmp_path / "t.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == ids.size
    for row in rows:
        place = int(row["position"]), trace.manifest.layers.index(int(row["layer"])), int(row["slot"])
        assert ids[place] == int(row["expert"]) and row["token_id"] == row["position"] and 0 < float(row["weight"]) < 1
    with pytest.raises(UserError, match="exists; choose another name"):
        export_csv(trace, tmp_path / "t.csv")
    with pytest.raises(UserError, match="has no 'logits'; it has"):
        export_npy(trace, tmp_path / "x.npy", "logits")


def run(*arguments: object):
    return CliRunner().invoke(app, ["trace", *map(str, arguments)])


def test_commands(tmp_path):
    record(tmp_path / "t")
    shown = run("show", tmp_path / "t", "--verify")
    assert shown.exit_code == 0 and "40 tokens (20 prefill, 20 decode) of 1 texts in 21 forward passes" in shown.output
    (tmp_path / "t" / "manifest.json").unlink()
    assert "cut off, or goes on" in run("show", tmp_path / "t").output
    assert json.loads(run("show", tmp_path / "t", "--json").output)["complete"] is False
    assert run("export", tmp_path / "t", tmp_path / "ids.npy").exit_code == 0
    made = run("import", tmp_path / "ids.npy", tmp_path / "u", "--layers", "1,3", "--prompt-tokens", 20, "--json")
    about = json.loads(made.output)
    assert about["steps"] == 21 and about["manifest"]["layers"] == [1, 3] and about["complete"]
    assert isinstance(run("export", tmp_path / "t", tmp_path / "ids.txt").exception, UserError)
    assert isinstance(run("import", tmp_path / "ids.npy", tmp_path / "v", "--layers", "3-1").exception, UserError)
    assert isinstance(run("show", tmp_path).exception, DataError)


def test_many_layers_fit_on_a_screen(tmp_path):
    record(tmp_path / "t", layers=tuple(range(61)))
    lines = run("show", tmp_path / "t").output.splitlines()
    assert len(lines) <= 24 and lines[-1] == "16 of 61 layers; --json has all"
    assert {lines[-17].split()[0], lines[-2].split()[0]} == {"0", "60"}


def test_verify_finds_a_changed_file(tmp_path):
    record(tmp_path / "t")
    part = tmp_path / "t" / "part-00000.safetensors"
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    assert "SHA-256" in str(run("show", tmp_path / "t", "--verify").exception)
