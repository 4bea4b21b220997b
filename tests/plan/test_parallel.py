"""Expert parallelism on paper against hand-computed cases."""

import random
from dataclasses import replace
from typing import Any

import pytest

from manyhands.errors import ConfigError
from manyhands.plan.machine import machine_named
from manyhands.plan.network import Network
from manyhands.plan.parallel import distinct_shards, per_device, remote_copies, smallest_count
from manyhands.plan.report import Ask
from manyhands.plan.report.scale import check_devices, parallel
from manyhands.plan.routes import Recorded, Route
from manyhands.plan.storage import FP8
from manyhands.plan.subject import read_subject


def test_distinct_destinations() -> None:
    assert distinct_shards(256, 8, 8) == pytest.approx(5.29, abs=0.01)
    assert distinct_shards(256, 8, 64) == pytest.approx(7.68, abs=0.01)
    assert distinct_shards(8, 2, 1) == 1
    assert distinct_shards(8, 8, 4) == pytest.approx(4)
    with pytest.raises(ValueError, match="3 shards"):
        distinct_shards(8, 2, 3)


def test_distinct_destinations_by_drawing() -> None:
    rng = random.Random(0)
    seen = [len({expert // 32 for expert in rng.sample(range(256), 8)}) for _ in range(20_000)]
    assert distinct_shards(256, 8, 8) == pytest.approx(sum(seen) / len(seen), abs=0.03)


def test_v3s_all_to_all() -> None:
    """4096 tokens of width 7168 to at most 4 of 8 nodes: 106 MB in FP8 is 2.1 ms at 50 GB/s, 206 MB in bf16 4.1 ms."""
    copies = remote_copies(256, 8, 8, limit=4)
    assert copies == 3.5
    way = Route("net", copies, 1.0, Network(latency=0.0, bandwidth=50e9))
    assert way.bytes(4096, 7168, 1.03) == pytest.approx(106e6, rel=5e-3)
    assert way.seconds(4096, 7168, 1.03) == pytest.approx(2.1e-3, rel=0.01)
    assert way.bytes(4096, 7168, 2.0) == pytest.approx(206e6, rel=5e-3)
    combine = way.seconds(4096, 7168, 2.0)
    assert combine == pytest.approx(4.1e-3, rel=0.01)
    assert replace(way, imbalance=1.5).seconds(4096, 7168, 2.0) == pytest.approx(1.5 * combine)


def test_a_limit_that_is_not_reached_changes_nothing() -> None:
    assert remote_copies(256, 8, 2, limit=4) == remote_copies(256, 8, 2)


def test_devices_that_hold_it() -> None:
    assert smallest_count(673.2e9, 80e9) == 10
    assert smallest_count(72e9, 80e9) == 1
    assert per_device(64e9, 4e9, 64, 16) == 8e9
    assert per_device(60e9, 0, 60, 8) == 8e9, "the fullest of 8 devices has 8 of 60 experts"


def test_a_nodes_own_links_count_too() -> None:
    """V3 on 16 H800, by drawing: 8 of 256 experts; in each node all wanted devices but the one that is there first."""
    rng, drawn = random.Random(1), 20_000
    inside = 0
    for _ in range(drawn):
        devices = {expert // 16 for expert in rng.sample(range(256), 8)}
        inside += len(devices - {0, 8})  # device 0 sends; its partner in the other node is 8
    (row,) = _rows("h800", 16)
    assert row["devices"] == "16 (links)"
    assert row["copies"]["value"] == pytest.approx(inside / drawn, rel=0.01)
    assert row["time"]["value"] == pytest.approx(0.86e-3, rel=0.01)


def _rows(machine: str, devices: int) -> list[dict[str, Any]]:
    subject = read_subject("deepseek-v3")
    ask = Ask(machine=machine_named(machine), devices=devices, scale=True, storage=FP8)
    section = parallel(subject, ask, machine_named(machine))
    assert section.table is not None
    return section.table.to_dict()


def test_devices_that_hold_it_divide_experts_and_nodes() -> None:
    """673 GB need ten devices of 80 GB; ten divide neither 256 experts nor nodes of eight, sixteen do."""
    subject, machine = read_subject("deepseek-v3"), machine_named("h800")
    section = parallel(subject, Ask(machine=machine, scale=True, storage=FP8), machine)
    assert section.figures[0].value == 16


def test_a_bandwidth_of_memory_is_no_network() -> None:
    subject = read_subject("deepseek-v3")
    with pytest.raises(ConfigError, match="no link between devices is known"):
        parallel(subject, Ask(scale=True), machine_named("m3-ultra"))
    with pytest.raises(ConfigError, match="no network between nodes is known"):
        check_devices(subject, machine_named("rtx-4090"), 8)


def test_a_given_network_joins_any_devices() -> None:
    """α and 1/β from --network: no nodes, latency counts, and a machine without links may be asked about."""
    subject, network = read_subject("deepseek-v3"), Network(latency=1e-3, bandwidth=1e9)
    ask = Ask(machine=machine_named("m3-ultra"), devices=64, scale=True, storage=FP8, network=network)
    check_devices(subject, machine_named("m3-ultra"), 64, network)
    table = parallel(subject, ask, machine_named("m3-ultra")).table
    assert table is not None
    (row,) = table.to_dict()
    copies = distinct_shards(256, 8, 64) * 63 / 64
    assert row["devices"] == "64 (node)" and row["copies"]["value"] == pytest.approx(copies)
    assert row["combine"]["value"] == pytest.approx(1e-3 + 4096 * copies * 7168 * 2 / 1e9)


def test_recorded_rows_and_load_replace_uniform_ones() -> None:
    subject, machine = read_subject("deepseek-v3"), machine_named("h800")
    found = Recorded(load=1.5, copies={"net": 2.0, "links": 3.0}, port={"net": 1.25, "links": 1.1})
    plain = Ask(machine=machine, devices=64, scale=True, storage=FP8)
    ask = replace(plain, recorded={64: found}, recorded_source="a trace")
    (row,), (uniform,) = (parallel(subject, one, machine).table.to_dict() for one in (ask, plain))  # type: ignore[union-attr]
    assert row["devices"] == "64 (net)" and row["copies"]["value"] == 2.0
    assert row["combine"]["value"] == pytest.approx(4096 * 2.0 * 7168 * 2 / 50e9 * 1.25)
    assert (row["busiest rows"]["value"], row["busiest load"]["value"]) == (1.25, 1.5)
    assert row["experts"]["value"] == pytest.approx(uniform["experts"]["value"] * (8 * 1.5 + 1) / 9), (
        "eight routed experts wait for the busiest device, the shared one, as large, does not"
    )
