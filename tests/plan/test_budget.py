"""Experts on disk in a process of so many bytes: the hit rate, the roofs, and what is refused."""

import json

import pytest

from manyhands.errors import UserError
from manyhands.plan import disk
from manyhands.plan.budget import BASELINE, HITS, Budget, expected_hits, token_rate
from manyhands.plan.report.ask import Ask
from manyhands.plan.traffic import StepBytes

from ..small_runs import manyhands
from .test_fit import _plan
from .test_machine import PLAIN

QWEN = ("qwen3-30b-a3b", "--format", "int4", "--context", "4k", "--prompt", "256")


def section(*arguments):
    found = _plan(*arguments)["sections"]["budget"]
    return {figure["label"]: figure["value"] for figure in found["figures"]}, found


def test_the_hit_rate_grows_with_the_share_from_nothing_to_all():
    assert expected_hits(0.0) == 0 and expected_hits(1.0) == 1
    assert all(expected_hits(share) == pytest.approx(hits) for share, hits in HITS)
    assert expected_hits(0.06) == pytest.approx((0.388 + 0.463) / 2)
    rising = [expected_hits(n / 1000) for n in range(1001)]
    assert rising == sorted(rising)
    assert all(hits >= n / 1000 for n, hits in enumerate(rising)), "real routing hits more than uniform routing"


def test_the_slower_of_disk_and_memory_counts():
    step = StepBytes(tokens=2, distinct=4, experts=8e9, fixed=1e9, cache=1e9)
    assert token_rate(step, 0.75, 2e9, 5e9) == pytest.approx(2 / 2)  # 10 GB from memory: 2 s; 2 GB from disk: 1 s
    assert token_rate(step, 0.0, 2e9, 5e9) == pytest.approx(2 / 4)
    assert token_rate(step, 0.0, 2e9, None) == pytest.approx(2 / 4)


def test_a_forecast_adds_up():
    values, found = section(*QWEN, "--memory", "6GB", "--disk", "2GB/s")
    assert values["all but experts"] + values["left for experts"] == 6e9
    assert values["all but experts"] > BASELINE
    routed = 48 * 128 * 3 * 2048 * 768 * 4.5 / 8
    assert values["of all experts"] == pytest.approx(values["left for experts"] / routed)
    assert values["experts of one step"] == pytest.approx(routed / 128 * 8)
    assert values["hit rate"] == expected_hits(values["of all experts"])
    missed = (1 - values["hit rate"]) * values["experts of one step"]
    assert values["from disk, per token"] == pytest.approx(missed)
    assert values["tokens/s"] == values["tokens/s, the disk alone"] == pytest.approx(2e9 / missed)
    assert values["tokens/s, memory alone"] is None and any("--machine here" in note for note in found["notes"])


def test_memory_bounds_what_the_disk_does_not():
    values, _ = section(*QWEN, "--memory", "40GB", "--disk", "2GB/s", "--machine", "desktop-ddr5")
    assert values["of all experts"] == values["hit rate"] == 1 and values["from disk, per token"] == 0
    assert values["tokens/s"] == values["tokens/s, memory alone"] > 10
    fast, _ = section(*QWEN, "--memory", "6GB", "--disk", "900GB/s", "--machine", "desktop-ddr5")
    assert fast["tokens/s"] == fast["tokens/s, memory alone"]
    slow, _ = section(*QWEN, "--memory", "6GB", "--machine", "desktop-ddr5")
    assert slow["tokens/s"] == slow["tokens/s, the disk alone"] < fast["tokens/s"]


def test_all_fits_and_nothing_is_known_of_memory():
    values, found = section(*QWEN, "--memory", "40GB", "--disk", "2GB/s")
    assert values["tokens/s"] is None and "all experts fit" in json.dumps(found)


def test_too_little_memory_names_what_works():
    values, found = section(*QWEN, "--memory", "700MB", "--disk", "2GB/s")
    assert values["tokens/s"] is None
    (said,) = [note for note in found["notes"] if "the least that works" in note]
    least = said.split("--memory ")[1].split()[0]
    bytes_ = float(least.removesuffix("GB").removesuffix("MB")) * (1e9 if least.endswith("GB") else 1e6)
    values, found = section(*QWEN, "--memory", f"{bytes_ * 1.001:.0f}", "--disk", "2GB/s")
    assert values["tokens/s"] and any("every token waits for the disk" in note for note in found["notes"])


def test_the_budget_itself():
    found = Budget(memory=10, rest=4, routed=60, step=12, layer=3)
    assert (found.slots, found.share, found.smallest, found.works) == (6, 0.1, 7, True)
    assert not Budget(6, 4, 60, 12, 3).works and Budget(3, 4, 60, 12, 3).slots == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mixtral-8x7b", "--memory", "4"), "--disk 2GB/s, or --machine here"),
        (("mixtral-8x7b", "--disk", "2GB/s"), "goes with --memory"),
        (("mixtral-8x7b", "--memory", "lots", "--disk", "2GB/s"), "--memory lots"),
        (("mixtral-8x7b", "--memory", "4GB", "--disk", "fast"), "--disk fast"),
        (("llama-3.1-8b", "--memory", "4GB", "--disk", "2GB/s"), "about experts"),
        (("mixtral-8x7b", "--memory", "4GB", "--versus", "kimi-k2"), "leave --versus out"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, message, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    done = manyhands("plan", *arguments)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_where_the_disk_rate_is_from():
    assert Ask().disk_rate is None
    assert (Ask(machine=PLAIN).disk_rate, Ask(machine=PLAIN).disk_source) == (5e9, "measured or listed")
    measured = PLAIN.model_copy(update={"disk_random": 3e9})
    assert (Ask(machine=measured).disk_rate, Ask(machine=measured).disk_source) == (3e9, "measured, at random")
    assert (Ask(machine=measured, disk=1e9).disk_rate, Ask(disk=1e9).disk_source) == (1e9, "as given")


def test_random_reads_of_a_real_file(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "_TRIAL_SECONDS", 0.02)
    monkeypatch.setattr(disk, "_FILE_BYTES", 1 << 24)
    found = disk.measure_disk(tmp_path / "new", record_bytes=10_000)
    assert found is None or min(found) > 1e5
    assert list((tmp_path / "new").iterdir()) == [], "the file that was read is gone"
    file = tmp_path / "file"
    file.write_bytes(bytes(1 << 20))
    before = file.stat().st_mtime_ns, file.read_bytes()
    assert disk.random_rate(file, 4096) > 1e5
    assert (file.stat().st_mtime_ns, file.read_bytes()) == before
    with pytest.raises(UserError, match="at least 16 records"):
        disk.random_rate(file, 1 << 20)
    with pytest.raises(UserError, match="cannot be read"):
        disk.random_rate(tmp_path / "none", 4096)
