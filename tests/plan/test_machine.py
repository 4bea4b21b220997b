"""Machines: the table, the measurement, what is remembered, and what doctor says."""

import json
import re
import tomllib
from pathlib import Path

import pytest

from manyhands import plan
from manyhands.catalog import load
from manyhands.cli.machines import Changes, read_machine
from manyhands.errors import ConfigError, UserError
from manyhands.plan import count_model, disk, measure, remember
from manyhands.plan.diagnose import diagnose, experts_from_disk
from manyhands.plan.here import Here
from manyhands.plan.machine import Machine, _plain, machine_named, machine_names
from manyhands.plan.roof import decode_bound, prefill_bound
from manyhands.plan.sizes import sizes_of
from manyhands.plan.storage import BF16, INT4

from ..small_runs import manyhands

PLAIN = Machine(
    name="here",
    title="this machine",
    kind="cpu",
    memory=64e9,
    bandwidth=50e9,
    rates={"fp32": 1e12, "bf16": 2e12},
    disk=5e9,
    source="made up",
)


def here(**changes: object) -> Here:
    values = {
        "key": remember.machine_key(),
        "measured": "2026-01-01T00:00:00+00:00",
        "machine": PLAIN,
        "processor": PLAIN,
        "cpu": "a processor",
        "cores": 8,
        "threads": 8,
        "features": ("avx2", "avx512f", "avx512_bf16", "amx_bf16"),
    }
    return Here.model_validate(values | changes)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "manyhands" / "machine.json"


def test_every_machine_of_the_table_has_its_source() -> None:
    for name in machine_names():
        machine = machine_named(name)
        assert len(machine.source) > 20 and machine.disk
        assert 1e9 < machine.memory < 1e12 and 1e10 < machine.bandwidth < 1e13


def test_the_table_is_broad_and_its_sources_can_be_looked_up() -> None:
    """Thirty or more: GPUs of three makers, unified memory, processors by channels; a page, a paper, or arithmetic."""
    machines = [machine_named(name) for name in machine_names()]
    assert len(machines) >= 30
    kinds = {(machine.kind, machine.title.split()[0]) for machine in machines}
    assert {("gpu", "NVIDIA"), ("gpu", "AMD"), ("gpu", "Intel"), ("unified", "Apple"), ("cpu", "Intel")} <= kinds
    said = ("https://", "arXiv", "NVIDIA", "AMD", "Apple", "Raspberry", "computed")
    assert [machine.name for machine in machines if not any(word in machine.source for word in said)] == []
    for machine in machines:
        if found := re.search(r"computed: (\d+) (?:channels )?x 8 bytes x (\d+) MT/s", machine.source):
            assert machine.bandwidth == pytest.approx(int(found[1]) * 8 * int(found[2]) * 1e6), machine.name
        assert machine.rates.get("int8", 0) >= machine.rates.get("bf16", 0) or "int8" not in machine.rates


@pytest.mark.parametrize(
    ("text", "name", "devices"),
    [
        ("8xh100", "h100", 8),
        ("8 x NVIDIA H100 80GB", "h100", 8),
        ("RTX 4090", "rtx-4090", 1),
        ("rtx4090", "rtx-4090", 1),
        ("2x4090", "rtx-4090", 2),
        ("mi300x8", "mi300x", 8),
        ("MI300X x 8", "mi300x", 8),
        ("AMD Radeon RX 7900 XTX", "rx-7900-xtx", 1),
        ("Ryzen AI Max+ 395", "ryzen-ai-max-395", 1),
        ("a100 40gb", "a100-40gb", 1),
        ("  Apple  M4   Max ", "m4-max", 1),
    ],
)
def test_spellings(text: str, name: str, devices: int) -> None:
    machine = machine_named(text)
    assert machine.devices == devices and machine.name == (name if devices == 1 else f"{name}x{devices}")


def test_no_spelling_means_two_machines() -> None:
    table = tomllib.loads((Path(plan.__file__).parent / "machines.toml").read_text(encoding="utf-8"))
    said = [(_plain(text), name) for name in machine_names() for text in (name, *table[name].get("also", []))]
    assert len(dict(said)) == len(said)
    assert all(machine_named(text).name == name for text, name in said)


def test_memory_that_the_named_machine_has_not() -> None:
    with pytest.raises(
        ConfigError, match="the table has Apple M4 Max, 128 GB; say --machine m4-max --memory-size 64GiB"
    ):
        machine_named("m4 max 64gb")


def test_figures_changed_by_hand() -> None:
    found = Changes("64GiB", "410GB/s", 2).of(machine_named("m4-max"))
    assert found is not None and found.title == "2 x Apple M4 Max, 128 GB, 64GiB and 410GB/s as given"
    assert (found.all_memory, found.all_bandwidth, found.name) == (2 * 64 * 2**30, 820e9, "m4-maxx2")
    assert Changes().of(found) is found and Changes().of(None) is None
    with pytest.raises(ConfigError, match="--count goes with --machine"):
        Changes(count=2).of(None)
    with pytest.raises(ConfigError, match="h100x8 is 8 devices already"):
        Changes(count=2).of(machine_named("8xh100"))
    with pytest.raises(UserError, match="--bandwidth fast: expected a size"):
        Changes(bandwidth="fast").of(found)


def test_a_machine_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "box.toml"
    path.write_text('memory = "96GiB"\nbandwidth = "400GB/s"\nrates = { bf16 = 50e12 }\ndevices = 2\ndisk = 3e9\n')
    found = read_machine(path)
    assert (found.name, found.title, found.devices, found.node, found.kind) == ("box", "2 x box", 2, 2, "cpu")
    assert found.memory == 96 * 2**30 and found.bandwidth == 400e9 and found.disk == 3e9 and not found.disk_assumed
    assert found.rate("bf16") == ("bf16", 100e12)
    path.write_text("memory = 1e9\nbandwidth = 1e9\n")
    assert read_machine(path).disk_assumed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("memory = 1e9", "bandwidth is missing"),
        ("memory = 'much'\nbandwidth = 1e9", "memory much: expected a size"),
        ("memory = nan\nbandwidth = 1e9", "memory"),
        ("memory = 1e9\nbandwidth = 0", "bandwidth"),
        ("memory = 1e9\nbandwidth = 1e9\nrates = { int3 = 1e12 }", "rates.int3: expected one of"),
        ("memory = 1e9\nbandwidth = 1e9\nrates = 3", "rates"),
        ("memory = 1e9\nbandwidth = 1e9\ncores = 8", "unknown field 'cores'"),
        ('memory = 1e9\nbandwidth = 1e9\ntitle = "\\u001b[31m"', "title must be one line"),
        ("memory = ", "not valid TOML"),
        ("a = " + "[" * 60_000, "not valid TOML"),
        ("#" * 70_000, "too long for a machine"),
    ],
)
def test_a_file_that_describes_no_machine(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "box.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_machine(path)
    with pytest.raises(ConfigError, match="No such file"):
        read_machine(tmp_path / "none.toml")


def test_several_of_one() -> None:
    one, eight = machine_named("h100"), machine_named("h100x8")
    assert eight.devices == 8 and eight.all_memory == 8 * one.memory and eight.all_bandwidth == 8 * one.bandwidth
    assert one.rate("bf16") == ("bf16", 989.4e12) and one.rate("fp8") == ("fp8", 1978.9e12)
    assert machine_named("a100").rate("fp8") == ("bf16", 312e12), "without fp8, the next wider rate is used"
    assert machine_named("m4-max").rate("bf16") is None
    for wrong in ("h1000", "h100x0", "assumed", "x8", ""):
        with pytest.raises(ConfigError, match="unknown machine"):
            machine_named(wrong)


def test_the_roof_by_hand() -> None:
    """OLMoE in bf16 at batch 1: its bytes over 50 GB/s; a long prompt: its FLOPs over 2 TFLOP/s."""
    config = load("olmoe-1b-7b").config
    assert config is not None
    sizes, counts = sizes_of(config), count_model(config)
    bound = decode_bound(PLAIN, sizes, counts, BF16)
    read = 2 * (counts.active_without_embedding + 2048)
    assert bound.tokens_per_second == pytest.approx(50e9 / read) and bound.limit == "read bandwidth"
    prompt = prefill_bound(PLAIN, sizes, counts, INT4, 2048)
    assert prompt.seconds == pytest.approx(prompt.flops / 2e12) and prompt.limit == "matrix rate (bf16)"
    blind = decode_bound(PLAIN.model_copy(update={"rates": {}}), sizes, counts, BF16)
    assert blind.limit == "read bandwidth (matrix rate unknown)" and blind.seconds == bound.seconds


def test_many_devices_wait_for_each_other() -> None:
    """V3 for one user on 1,024 devices: 61 layers, two collectives of 10 µs each, so at most 820 tokens per second."""
    config = load("deepseek-v3").config
    assert config is not None
    sizes, counts = sizes_of(config), count_model(config)
    many = decode_bound(machine_named("h100x1024"), sizes, counts, BF16)
    assert many.tokens_per_second == pytest.approx(1 / (61 * 2 * 10e-6)) and many.limit == "latency between devices"
    assert decode_bound(machine_named("h100"), sizes, counts, BF16).wait_seconds == 0


def test_measured_once_and_remembered(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Path] = []

    def fake(directory: Path) -> Here:
        calls.append(directory)
        return here()

    monkeypatch.setattr(measure, "measure", fake)
    assert remember.remembered() is None
    first = remember.measured(quiet=True)
    assert remember.measured(quiet=True) == first == remember.remembered() and len(calls) == 1
    assert calls == [cache.parent] and [path.name for path in cache.parent.iterdir()] == ["machine.json"]
    remember.measured(again=True, quiet=True)
    assert len(calls) == 2


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 1}', "[" * 100_000, '{"key": 3}'])
def test_a_damaged_memory_is_measured_anew(cache: Path, content: str) -> None:
    cache.parent.mkdir()
    cache.write_text(content)
    assert remember.remembered() is None


def test_another_machines_figures_are_not_used(cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text(json.dumps(here(key="elsewhere").model_dump(mode="json")))
    assert remember.remembered() is None


def test_a_real_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small, so that it is quick: only that every figure is there and possible."""
    monkeypatch.setattr(measure, "_READ_BYTES", 1 << 24)
    monkeypatch.setattr(disk, "_FILE_BYTES", 1 << 24)
    monkeypatch.setattr(disk, "_TRIAL_SECONDS", 0.01)
    monkeypatch.setattr(measure, "_TRIAL_SECONDS", 0.01)
    found = measure.measure(tmp_path).processor
    assert 1e8 < found.bandwidth < 1e14 and 1e8 < found.rates["fp32"] < 1e16
    assert found.memory > 1e8 and (found.disk is None or found.disk > 1e5)
    assert not list(tmp_path.iterdir()), "the file that was read is gone"


def said(machine: Here, load: float = 0.0, free: float = 60e9, **environment: str) -> str:
    return " | ".join(diagnose(machine, environment=environment, load=load, free=free))


def test_what_doctor_says() -> None:
    gpu = PLAIN.model_copy(update={"kind": "gpu"})
    assert said(here(machine=gpu)) == ""
    assert "no GPU" in said(here()) and "AMX" not in said(here())
    assert "no AMX: prefill" in said(here(features=("avx2", "avx512f")))
    assert "no AVX-512 and no AMX" in said(here(features=("avx2",)))
    assert "set OMP_NUM_THREADS=8" in said(here(threads=16))
    assert "OMP_NUM_THREADS is set" in said(here(threads=1), OMP_NUM_THREADS="1")
    assert "busy: load average 7.5" in said(here(), load=7.5)
    assert "are free now" in said(here(), free=10e9)
    slow = PLAIN.model_copy(update={"rates": {"fp32": 1e11, "bf16": 1e9}})
    assert "bf16 100 times slower than float32" in said(here(machine=slow, processor=slow))
    little = PLAIN.model_copy(update={"memory": 8e9, "disk": 2e8})
    assert "little memory" in said(here(machine=little, processor=little))
    assert "slow disk" in said(here(machine=little, processor=little))


def test_what_doctor_forecasts() -> None:
    random = PLAIN.model_copy(update={"disk_random": 2e9})
    found = experts_from_disk(here(processor=random), share=0.2)
    assert found is not None and found["bytes_per_second"] == 2e9
    assert found["tokens_per_second"] == pytest.approx(2 / (1 - 0.748))
    assert experts_from_disk(here(processor=PLAIN.model_copy(update={"disk": None}))) is None


def test_power_has_a_source_and_gives_the_energy_of_a_token() -> None:
    """At the power limit: watts of all devices over the expected tokens a second; not said where it is not known."""
    powered = [machine for name in machine_names() if (machine := machine_named(name)).power is not None]
    assert len(powered) >= 12 and all(machine.power_source.startswith("https://") for machine in powered)
    assert all(machine.kind == "gpu" and 50 <= (machine.power or 0) <= 1000 for machine in powered)
    asked = ["plan", "qwen3-30b-a3b", "--format", "int8", "--json", "--machine"]
    told = [json.loads(manyhands(*asked, name).stdout)["sections"]["expected"] for name in ("4xh100", "m4-max")]
    assert len(told[0]["figures"]) == len(told[0]["table"]) >= 3 and not told[1]["figures"]
    for figure, row in zip(told[0]["figures"], told[0]["table"], strict=True):
        assert figure["label"] == f"energy a token, {row['step']}" and figure["unit"] == "J"
        assert figure["value"] == pytest.approx(4 * 700 / row["estimate"]["value"], rel=1e-12)
    assert "every device draws its limit of 700 W" in told[0]["notes"][-1]
