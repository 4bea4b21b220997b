"""Speeds of this machine: kept whole and bounded, with their machine, and fitted into plan's estimates."""

import json
from pathlib import Path

import pytest

from manyhands.cli.machines import Changes, recorded_here
from manyhands.plan import recorded, remember
from manyhands.plan.estimate import Kind, estimate
from manyhands.plan.here import Here
from manyhands.plan.machine import Machine, machine_named
from manyhands.plan.recorded import RecordedSpeed, format_kind, record, recorded_points, recorded_speeds, speed_of
from manyhands.plan.roof import Bound, decode_bound, prefill_bound
from manyhands.plan.storage import BF16, FP32, INT4, INT8, MXFP4, PACKED_INT4, STORAGES, Storage
from manyhands.plan.subject import Subject, read_subject

from ..small_runs import manyhands

MACHINE = Machine(
    name="here",
    title="this machine",
    kind="cpu",
    memory=64e9,
    bandwidth=50e9,
    rates={"fp32": 1e12, "bf16": 2e12, "int8": 4e12},
    source="made up",
)
HERE = Here(
    key=remember.machine_key(),
    measured="2026-01-01T00:00:00+00:00",
    machine=MACHINE,
    processor=MACHINE,
    cpu="a processor",
    cores=2,
    threads=2,
    features=(),
)
SHARE, CONSTANT = 0.5, 40e-6


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This machine, as made up, in a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "manyhands").mkdir()
    (tmp_path / "manyhands" / "machine.json").write_text(HERE.model_dump_json())
    return tmp_path / "manyhands" / "speeds.json"


def told(subject: Subject, bound: Bound, seconds: float, storage: Storage, work: str, batch: int = 1) -> RecordedSpeed:
    assert subject.sizes is not None
    about = {"model": subject.catalogue, "sizes": subject.sizes, "storage": storage, "work": work, "batch": batch}
    return speed_of(bound, seconds, context=512, threads=2, **about)  # type: ignore[arg-type]


def speed(
    model: str, storage: Storage = INT4, work: str = "decode", batch: int = 1, slower: float = 1.0
) -> RecordedSpeed:
    """A model of the catalogue on a machine that takes x/0.5 + 40 µs a layer."""
    subject = read_subject(model)
    sizes, counts = subject.sizes, subject.counts
    assert sizes is not None
    if work == "decode":
        bound = decode_bound(MACHINE, sizes, counts, storage, batch=batch, context=512)
    else:
        bound = prefill_bound(MACHINE, sizes, counts, storage, 512)
    seconds = (bound.seconds / SHARE + CONSTANT * len(sizes.windows)) * slower
    return told(subject, bound, seconds, storage, work, batch)


MODELS = ("olmoe-1b-7b", "qwen3-30b-a3b", "granite-3-1b-a400m", "deepseek-v2-lite", "gpt-oss-20b", "mixtral-8x7b")


def test_a_speed_is_kept_as_its_work_and_its_bound_follows_the_machine() -> None:
    one = speed("olmoe-1b-7b")
    record([one])
    assert recorded_speeds() == (one,)
    (point,) = recorded_points(HERE)
    assert point.taken == pytest.approx(point.bound / SHARE + CONSTANT, rel=1e-12)
    slower = HERE.model_copy(update={"processor": MACHINE.model_copy(update={"bandwidth": 25e9})})
    assert recorded_points(slower)[0].bound == pytest.approx(2 * point.bound, rel=1e-12)


def test_prefill_is_bound_by_the_rate_of_its_format() -> None:
    subject = read_subject("olmoe-1b-7b")
    assert subject.sizes is not None
    for storage, rate in ((FP32, 1e12), (BF16, 2e12), (INT8, 4e12), (INT4, 4e12)):
        bound = prefill_bound(MACHINE, subject.sizes, subject.counts, storage, 2048)
        assert bound.rate is not None and bound.rate[1] == rate and bound.limit.startswith("matrix rate")
        point = told(subject, bound, 1.0, storage, "prefill").point(MACHINE)
        assert point.bound * 16 == pytest.approx(bound.seconds, rel=1e-9)


def test_newer_speeds_take_the_place_of_older_ones_and_the_file_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = speed("olmoe-1b-7b"), speed("olmoe-1b-7b", slower=2.0)
    record([first, speed("olmoe-1b-7b", batch=16)])
    record([second])
    assert [found.batch for found in recorded_speeds()] == [16, 1] and recorded_speeds()[1].seconds == second.seconds
    monkeypatch.setattr(recorded, "MOST", 3)
    record(first.model_copy(update={"model": f"model {i}"}) for i in range(9))
    assert [found.model for found in recorded_speeds()] == ["model 6", "model 7", "model 8"]


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"version": 1', '"version": 2'),
        lambda text: text.replace(remember.machine_key(), "another/machine"),
        lambda text: text.replace('"layers": 16', '"layers": 0'),
        lambda text: text.replace('"seconds": ', '"seconds": -'),
        lambda text: text.replace('"rate": "int8"', '"rate": "int3"'),
        lambda text: text.replace('"model"', '"modell"'),
        lambda text: "[" * 100_000,
        lambda text: " " * (1 << 21),
        lambda text: "",
    ],
)
def test_a_file_that_is_not_ours_is_no_speed(cache: Path, change: "object") -> None:
    record([speed("olmoe-1b-7b")])
    text = cache.read_text()
    changed = change(text)  # type: ignore[operator]
    assert changed != text
    cache.write_text(changed)
    assert recorded_speeds() == ()
    done = manyhands("plan", "olmoe-1b-7b", "--format", "int4")
    assert done.returncode == 0 and "published by others" in done.stdout
    record([speed("olmoe-1b-7b")])
    assert len(recorded_speeds()) == 1


def test_other_threads_and_other_versions_do_not_count() -> None:
    one = speed("olmoe-1b-7b")
    record([one, one.model_copy(update={"threads": 1}), one.model_copy(update={"program": "0.0.1"})])
    assert len(recorded_speeds()) == 3 and len(recorded_points(HERE)) == 1
    assert recorded.why_not(HERE, 1, 0.0) is not None and recorded.why_not(HERE, 2, 1.6) is not None
    assert recorded.why_not(HERE, 2, 1.4) is None and recorded.why_not(HERE, 2, None) is None


def test_only_this_machine_as_it_is_has_them() -> None:
    record([speed("olmoe-1b-7b")])
    assert len(recorded_here(MACHINE)) == 1
    assert recorded_here(None) == recorded_here(machine_named("epyc-9654")) == []
    assert recorded_here(Changes(bandwidth="60GB/s").of(MACHINE)) == []


def test_formats_that_run_alike() -> None:
    kinds = {name: format_kind(storage, sparse=True) for name, storage in STORAGES.items()}
    assert kinds["fp32"] == "32 bits" and kinds["bf16"] == "16 bits" and kinds["int8"] == kinds["fp8"] == "8 bits"
    assert kinds["int4"] == kinds["mxfp4"] == kinds["manyhands-int4"] == "4 bits"
    assert format_kind(MXFP4, sparse=False) == "16 bits" and format_kind(PACKED_INT4, sparse=False) == "8 bits"
    assert format_kind(Storage("packed", 16, 16, 16, 16), sparse=True) == "16 bits, packed"
    assert format_kind(Storage("packed", 5.1, 9.1, 16, 16), sparse=True) == "4 bits"  # padded


def test_models_that_were_not_run_are_estimated_within_a_tenth() -> None:
    """Five models recorded with 5 % of noise, the sixth estimated: decoding alone and together, and prefill."""
    noise = {model: 1 + 0.05 * (-1) ** i for i, model in enumerate(MODELS)}
    for left_out in MODELS:
        rest = [model for model in MODELS if model != left_out]
        speeds = [speed(m, work=work, batch=batch, slower=noise[m])
                  for m in rest for work, batch in (("decode", 1), ("decode", 16), ("prefill", 1))]  # fmt: skip
        record(speeds)
        wanted = speed(left_out)
        subject = read_subject(left_out)
        assert subject.sizes is not None
        bound = decode_bound(MACHINE, subject.sizes, subject.counts, INT4, context=512)
        found = estimate(
            bound, wanted.layers, Kind("decode", host=True, format="4 bits"), recorded_points(HERE, speeds)
        )
        assert found.recorded and found.source == "from 5 speeds recorded here"
        assert found.tokens_per_second * wanted.seconds == pytest.approx(1.0, rel=0.1)
        assert found.low <= 1 / wanted.seconds <= found.high


def test_plan_takes_what_was_recorded_here_and_says_so() -> None:
    record([speed(model, batch=batch) for model in MODELS for batch in (1, 16)])
    done = manyhands("plan", "phi-3.5-moe", "--format", "int4", "--context", "512", "--json")
    section = json.loads(done.stdout)["sections"]["expected"]
    assert "decode, batch 1 and decode, batch 8 and decode, batch 64: from 6 speeds recorded" in section["notes"][0]
    assert "prefill" in section["notes"][0] and "published by others" in section["notes"][0]
    one = section["table"][0]
    subject = read_subject("phi-3.5-moe")
    assert subject.sizes is not None
    bound = decode_bound(MACHINE, subject.sizes, subject.counts, INT4, context=512)
    expected = 1 / (bound.seconds / SHARE + CONSTANT * 32)
    assert one["estimate"]["value"] == pytest.approx(expected, rel=0.01)
