"""A training step on many devices, against the same arithmetic by hand."""

from dataclasses import replace
from math import log2

import pytest

from manyhands.plan.compute import training_flops
from manyhands.plan.machine import machine_named
from manyhands.plan.network import Network
from manyhands.plan.parallel import COMBINE_BYTES, DISPATCH_BYTES
from manyhands.plan.routes import Fabric, Recorded
from manyhands.plan.scaling import EXCHANGE, GATHER, MEMORY, WAITING, Job, best_step, step_on
from manyhands.plan.subject import read_subject

V3 = read_subject("deepseek-v3")
assert V3.sizes is not None
FABRIC = Fabric.of(machine_named("h800"))
assert FABRIC is not None
JOB = Job(V3.sizes, V3.counts, FABRIC, rate=4e14, memory=80e9, tokens=4096, length=4096)


def test_v3_on_512_by_hand() -> None:
    """64 devices share experts: 4 of 8 nodes, 3.5 copies over the network; 8 sets."""
    step = step_on(JOB, 512, 64)
    assert step.arithmetic == pytest.approx(4096 * training_flops(JOB.sizes, JOB.counts, 4096) / 4e14)
    moved = 4096 * 3.5 * 7168 * (DISPATCH_BYTES + COMBINE_BYTES) / 50e9
    assert step.exchange == pytest.approx(2 * 58 * (moved + 2 * 10e-6))
    shared = V3.counts.by_component["shared experts"]
    assert step.hidden == pytest.approx(4096 * 6 * shared / 4e14)
    others = JOB.others * 8 * 511 / 512 / 200e9 + 3 * 61 * log2(512) * 10e-6  # eight ports a node: links are slower
    experts = JOB.experts / 64 * 8 * 7 / 8 / 50e9 + 3 * 58 * log2(8) * 10e-6  # one device of each node has the same
    assert step.gather == pytest.approx(others + experts)
    assert step.waiting == 0 and step.fits and step.limit == EXCHANGE
    assert step.seconds == pytest.approx(step.arithmetic + step.exchange - step.hidden), "wires are free for longer"
    few = step_on(replace(JOB, tokens=512), 512, 64)
    assert few.limit == GATHER and few.seconds == pytest.approx(few.gather + few.exchange), "the wires never rest"


def test_fsdp_alone_gathers_every_expert() -> None:
    """Without expert parallelism nothing is exchanged, and 5 TB travel to each device every step."""
    step = step_on(JOB, 512, 1)
    assert step.exchange == step.waiting == 0 and step.limit == GATHER
    assert step.gather > 20 * step.arithmetic / 2 and best_step(JOB, 512, [1, 8, 64]).ep == 64


def test_the_busiest_device_is_waited_for() -> None:
    even, uneven = step_on(JOB, 64, 64), step_on(replace(JOB, imbalance=2.0), 64, 64)
    routed = 4096 * 6 * JOB.experts / 256 * 8 / 4e14
    assert uneven.waiting == pytest.approx(routed)
    latency = 2 * 58 * 2 * 10e-6
    assert uneven.exchange - latency == pytest.approx(2 * (even.exchange - latency))
    big = replace(JOB, imbalance=2.0, fabric=replace(FABRIC, network=Network(latency=0, bandwidth=1e13)))
    assert step_on(replace(big, memory=1e15), 64, 64).limit == WAITING


def test_a_trace_says_how_uneven() -> None:
    found = Recorded(load=1.5, copies={"net": 3.0, "links": 0.1}, port={"net": 1.2, "links": 1.0})
    step, even = step_on(replace(JOB, recorded={64: found}), 512, 64), step_on(JOB, 512, 64)
    latency = 2 * 58 * 2 * 10e-6
    assert step.exchange - latency == pytest.approx((even.exchange - latency) * 3.0 / 3.5 * 1.2)
    assert step.waiting == pytest.approx(0.5 * 4096 * 6 * JOB.experts / 256 * 8 / 4e14)


def test_memory_falls_with_devices_and_stops_at_blocks() -> None:
    """16 bytes a parameter over all devices; what does not fit is named."""
    eight, many = step_on(JOB, 8, 8), step_on(JOB, 8192, 64)
    assert eight.held > 16 * V3.counts.total / 8 and eight.limit == MEMORY and not eight.fits
    parts = V3.counts.by_component
    others = (JOB.others - parts["embedding"] - parts["head"]) / 61
    assert many.held == pytest.approx(16 * V3.counts.total / 8192 + 2 * 2 * (others + JOB.experts / 58 / 64))
    assert best_step(JOB, 8, [1, 2, 4, 8]).ep == 8, "nothing fits: the one that needs least"


def test_one_device_exchanges_and_gathers_nothing() -> None:
    step = step_on(JOB, 1, 1)
    assert step.exchange == step.gather == 0 and step.efficiency == 1.0
