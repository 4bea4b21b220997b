"""A trace on disk: what is recorded is read, a cut recording is read as far as it goes, anything else is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from manyhands.checkpoint import verify
from manyhands.errors import ConfigError, DataError, UserError
from manyhands.trace.counts import expert_counts
from manyhands.trace.part import check_part, part_name
from manyhands.trace.recording import Manifest, Part, Phase, Recorder, Trace
from tests.trace.traces import record, routing


@pytest.mark.parametrize("E", [8, 255, 300])
@pytest.mark.parametrize("part_bytes", [1 << 20, 500])
def test_what_was_recorded_is_read(tmp_path, E, part_bytes):
    passes = record(tmp_path / "t", E=E, part_bytes=part_bytes)
    trace = Trace.open(tmp_path / "t")
    assert trace.complete and len(trace) == 40 and trace.manifest.layers == (1, 3)
    assert len(list(trace.parts())) == (1 if part_bytes > 500 else len(list((tmp_path / "t").glob("part-*"))))
    steps = list(trace.steps())
    assert [len(step) for step in steps] == [20] + [1] * 20  # whatever the parts' borders
    for step, made in zip(steps, passes, strict=True):
        for at, layer in enumerate((1, 3)):
            assert np.array_equal(step.expert_ids[:, at], made[layer].expert_ids.numpy())
            assert np.array_equal(step.weights[:, at], made[layer].weights.numpy().astype(np.float16))
    everything = [part.arrays() for part in trace.parts()]
    assert np.concatenate([a["token_ids"] for a in everything]).tolist() == list(range(40))
    assert np.concatenate([a["position"] for a in everything]).tolist() == list(range(40))
    assert np.concatenate([a["phase"] for a in everything]).tolist() == [Phase.PREFILL] * 20 + [Phase.DECODE] * 20
    verify(tmp_path / "t", exact=True)


def test_counts(tmp_path):
    passes = record(tmp_path / "t", part_bytes=300)
    counts = expert_counts(Trace.open(tmp_path / "t"))
    for at, layer in enumerate((1, 3)):
        assert counts[at].tolist() == sum(p[layer].expert_counts() for p in passes).tolist()


def test_no_expert_masked_tokens_and_layers_of_fewer_experts_a_token(tmp_path):
    wide, narrow = routing(3, 8, 2, 0), routing(3, 8, 1, 1)
    wide.expert_ids[1, 1] = -1
    wide.token_mask[2] = False
    with Recorder(tmp_path / "t", layers=[0, 1], num_experts=8, num_experts_per_tok=2) as recorder:
        recorder.add({0: wide, 1: narrow}, [5, 6, 7], sequence=[1, 1, 2], position=[0, 1, 0], step=0)
    (part,) = Trace.open(tmp_path / "t").parts()
    assert part.token_ids.tolist() == [5, 6] and part.expert_ids[1, 0, 1] == 255
    assert (part.expert_ids[:, 1, 1] == 255).all() and (part.weights[:, 1, 1] == 0).all()
    assert expert_counts(Trace.open(tmp_path / "t")).sum() == 3 + 2


def test_every_optional_array(tmp_path):
    found = routing(4, 8, 2, 0)
    fields = {"recorded": ("weights", "kept", "logits"), "record_bytes": (10,), "source": "a test"}
    with Recorder(tmp_path / "t", layers=[2], num_experts=8, num_experts_per_tok=2, **fields) as recorder:
        recorder.add({2: found}, torch.arange(4), sequence=0, position=range(4), step=0)
    (part,) = Trace.open(tmp_path / "t").parts()
    assert part.kept.all() and np.array_equal(part.logits[:, 0], found.logits.numpy().astype(np.float16))
    assert Trace.open(tmp_path / "t").manifest.record_bytes == (10,)


def test_the_limit_keeps_the_newest(tmp_path):
    limit = 8000
    record(tmp_path / "t", T=400, limit=limit)
    trace = Trace.open(tmp_path / "t")
    assert sum(p.stat().st_size for p in (tmp_path / "t").glob("part-*")) <= limit
    positions = np.concatenate([part.position for part in trace.parts()])
    assert positions.tolist() == list(range(800 - len(trace), 800)) and 100 < len(trace) < 800
    with pytest.raises(UserError, match="a limit of 50 bytes is too little"):
        record(tmp_path / "u", limit=50)
    assert not (tmp_path / "u").exists()


def test_a_used_directory_is_left_alone(tmp_path):
    record(tmp_path / "t")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="exists and is not empty"):
        record(tmp_path / "t")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is not a directory"):
        record(tmp_path / "file")
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "file", *before]


def test_many_parts_are_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr("manyhands.trace.recorder.part_name", lambda number: part_name(number + 99_990))
    record(tmp_path / "t", part_bytes=60)
    parts = list(Trace.open(tmp_path / "t").parts())
    assert len(parts) > 15 and np.concatenate([part.position for part in parts]).tolist() == list(range(40))


def test_a_part_is_written_when_it_is_old(tmp_path, monkeypatch):
    monkeypatch.setattr("manyhands.trace.recorder.PART_SECONDS", -1.0)
    record(tmp_path / "t")
    assert len(list(Trace.open(tmp_path / "t").parts())) == 21


_KILLED = """
import sys, time
from tests.trace.traces import routing
from manyhands.trace.recording import Recorder
recorder = Recorder(sys.argv[1], layers=[0], num_experts=8, num_experts_per_tok=2, part_bytes=2000)
for step in range(10**6):
    recorder.add({0: routing(10, 8, 2, step)}, range(10), sequence=step, position=range(10), step=step)
    time.sleep(0.002)
"""


def test_a_killed_recording_keeps_its_finished_parts(tmp_path):
    path = tmp_path / "t"
    child = subprocess.Popen([sys.executable, "-c", _KILLED, str(path)], cwd=Path(__file__).parents[2])
    deadline = time.monotonic() + 60
    while len(list(path.glob("part-*"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    trace = Trace.open(path)
    assert not trace.complete and len(trace) >= 100
    assert sum(len(part) for part in trace.parts()) == len(trace)


def broken(tmp_path, change) -> str:
    """What is said of a trace of one part after a change of its arrays."""
    path = tmp_path / "t"
    record(path)
    (path / "manifest.json").unlink()
    part = path / "part-00000.safetensors"
    arrays = {name: array.copy() for name, array in safetensors.numpy.load(part.read_bytes()).items()}
    change(arrays)
    part.write_bytes(safetensors.numpy.save(arrays))
    with pytest.raises(DataError) as error:
        list(Trace.open(path).parts())
    assert "part-00000" in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "at", "value", "said"),
    [
        ("expert_ids", (3, 1, 0), 8, "expert_ids[3, 1, 0] is 8: there are 8 experts"),
        ("phase", 2, 4, "phase[2] is 4: at most 3"),
        ("sequence", 0, -1, "sequence[0] is -1: must not be negative"),
        ("step", 20, -5, "step[20] is -5"),
        ("step", 20, 40, "step falls"),
        ("token_ids", 1, -2, "token_ids[1] is -2"),
        ("weights", (0, 0, 1), np.nan, "weights[0, 0, 1] is nan"),
    ],
)
def test_values_out_of_range_are_named(tmp_path, name, at, value, said):
    def change(arrays):
        arrays[name][at] = value

    assert said in broken(tmp_path, change)


def test_arrays_that_are_not_the_manifests_are_named(tmp_path):
    assert "'weights' is missing" in broken(tmp_path / "a", lambda a: a.pop("weights"))
    assert "'more' is not one" in broken(tmp_path / "b", lambda a: a.update(more=np.zeros(3)))
    assert "phase is int64 [40]" in broken(tmp_path / "c", lambda a: a.update(phase=a["phase"].astype(np.int64)))
    assert "no shape [T] of 'step'" in broken(tmp_path / "d", lambda a: a.pop("step"))
    assert "expert_ids is uint8 [40, 1, 2], expected uint8 [40, 2, 2]" in broken(
        tmp_path / "e", lambda a: a.update(expert_ids=a["expert_ids"][:, :1].copy())
    )


def test_damaged_files_are_refused_in_one_line(tmp_path):
    def said(change, match):
        path = tmp_path / f"t{len(list(tmp_path.iterdir()))}"
        record(path, part_bytes=500)
        change(path)
        with pytest.raises(DataError, match=match) as error:
            list(Trace.open(path).parts())
        assert "\n" not in str(error.value)

    def edit(path, **values):
        about = json.loads((path / "trace.json").read_text()) | values
        (path / "trace.json").write_text(json.dumps(about))

    first = "part-00000.safetensors"
    said(lambda p: (p / "trace.json").unlink(), "a directory without a trace.json")
    said(lambda p: (p / "trace.json").write_text("{"), "not valid JSON")
    said(lambda p: edit(p, num_experts=70000), "num_experts = 70000")
    said(lambda p: edit(p, layers=[3, 1]), "layers are not ascending")
    said(lambda p: edit(p, layers=[1, 3, 5]), r"expert_ids is uint8 \[\d+, 2, 2\], expected uint8 \[\d+, 3, 2\]")
    said(lambda p: edit(p, record_bytes=[1]), "1 record_bytes for 2 layers")
    said(lambda p: (p / "part-00001.safetensors").unlink(), "part-00001.safetensors is missing")
    said(lambda p: (p / "part-00099.safetensors").write_bytes(b""), "is missing between")
    said(lambda p: os.truncate(p / first, 300), "300 bytes where manifest.json says")
    said(lambda p: ((p / "manifest.json").unlink(), os.truncate(p / first, 600)), "truncated")
    said(lambda p: ((p / "manifest.json").unlink(), os.truncate(p / first, 5)), "truncated")
    said(lambda p: ((p / "manifest.json").unlink(), os.truncate(p / first, 1 << 40)), "a part of a trace has at most")
    said(lambda p: ((p / "manifest.json").unlink(), (p / first).write_bytes(b"\xff" * 9000)), "not a part")
    said(lambda p: ((p / first).unlink(), (p / first).symlink_to("/dev/zero")), "not a regular file")
    said(lambda p: ((p / first).unlink(), os.mkfifo(p / first)), "not a regular file")
    with pytest.raises(DataError, match="not a directory with"):
        Trace.open(tmp_path / "none")


def test_any_flipped_byte_is_an_error_or_another_trace(tmp_path):
    """Nothing but DataError comes out of damage, and what is read keeps to the manifest."""
    record(tmp_path / "t")
    (tmp_path / "t" / "manifest.json").unlink()
    part = tmp_path / "t" / "part-00000.safetensors"
    good, rng = part.read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        data = bytearray(good)
        data[int(rng.integers(len(data) if rng.random() < 0.3 else 700))] = int(rng.integers(256))
        part.write_bytes(data)
        try:
            for found in Trace.open(tmp_path / "t").parts():
                check_part(found.arrays(), Trace.open(tmp_path / "t").manifest, "again")
        except DataError:
            refused += 1
    assert refused > 100


def test_a_step_that_never_ends_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("manyhands.trace.recording._MOST_STEP_BYTES", 500)
    record(tmp_path / "t", part_bytes=200)
    with pytest.raises(DataError, match="step 0 has more than"):
        list(Trace.open(tmp_path / "t").steps())


def test_manifest_says_what_is_wrong():
    with pytest.raises(ConfigError, match="9 experts per token of 8"):
        Manifest(layers=(0,), num_experts=8, num_experts_per_tok=9)


def test_rows():
    part = Part(*(np.arange(4) for _ in range(6)))
    assert len(part.rows(slice(1, 3))) == 2 and part.rows(np.array([0, 2])).step.tolist() == [0, 2]
