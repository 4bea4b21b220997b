"""`simulate --layout`: a trace on disk laid out on ranks, as a person asks for it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from manyhands.cli.main import app
from manyhands.config.parallel import Layout
from manyhands.errors import ManyhandsError, UserError
from manyhands.format import show
from manyhands.plan.network import Network
from manyhands.plan.parallel import distinct_shards
from manyhands.simulate.parallel import COLLECTIVES, PER_CHOICE, Settings, laid_out
from manyhands.trace.recording import Phase, Recorder
from tests.trace.traces import record, routing


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prompt of 64 tokens, then 64 alone; layers 1 and 3, 2 of 8 experts."""
    path = tmp_path_factory.mktemp("parallel") / "trace"
    record(path, T=64)
    return path


@pytest.fixture(scope="module")
def skewed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One pass of 4,000 tokens, 2 of 8 experts; experts 0 and 1 are chosen most."""
    path = tmp_path_factory.mktemp("parallel") / "skewed"
    rng = np.random.default_rng(0)
    scores = rng.random((4_000, 8)) + np.array([0.5, 0.3, 0, 0, 0, 0, 0, 0])
    chosen = torch.from_numpy(np.argsort(-scores, axis=-1)[:, :2].copy())
    with Recorder(path, layers=[0], num_experts=8, num_experts_per_tok=2) as recorder:
        one = replace(routing(4_000, 8, 2, 0), expert_ids=chosen)
        recorder.add({0: one}, -1, sequence=0, position=np.arange(4_000), phase=Phase.PREFILL, step=0)
    return path


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["simulate", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_the_table_and_the_json_agree(trace: Path) -> None:
    found = json.loads(run(trace, "--layout", "2x4", "--node", 2, "--json"))
    first = found["by_layer"][0]
    text = run(trace, "--layout", "2x4", "--node", 2).splitlines()
    head, line = (line.split() for line in (text[3], text[4]))
    assert head[0] == "layer" and line[0] == str(first["layer"]) == "1"
    per_token = [first[way]["remote"] / found["tokens"] for way in ("by_pairs", "by_tokens", "network")]
    assert line[1:4] == [f"{rows:.3f}" for rows in per_token]
    assert line[4:7] == [
        f"{x:.3f}" for x in (first["distinct_ranks"], distinct_shards(8, 2, 4), first["distinct_nodes"])
    ]
    assert line[7] == f"{distinct_shards(8, 2, 2):.3f}"
    assert line[9:11] == [f"{first['load_over_mean'][name]:.3f}" for name in ("all", "by_pass")]
    ranks = [line.split() for line in text if line[:1].isdigit()][2:]
    assert [int(rank[1].replace(",", "")) for rank in ranks] == [
        sum(layer["by_pairs"]["sent"][w] for layer in found["by_layer"]) for w in range(8)
    ]
    assert sum(first["by_pairs"]["sent"]) == sum(first["by_pairs"]["received"]) == first["by_pairs"]["remote"]
    assert sum(first["load"]) == 128 * 2, "every pair is computed somewhere"


def test_placement_by_load_evens_it_out(skewed: Path) -> None:
    plain = laid_out(skewed, Settings(Layout(1, 4)))
    placed = laid_out(skewed, Settings(Layout(1, 4), "eplb"))
    copied = laid_out(skewed, Settings(Layout(1, 4), "eplb", redundant=4))
    assert plain.plain is None and placed.plain is not None
    assert placed.plain.load_L[0] == plain.exchange.load_L[0] > placed.exchange.load_L[0] > 1.5, "expert 0 is too much"
    assert copied.exchange.load_L[0] < 1.2
    assert copied.uniform is None and placed.uniform == plain.uniform


def test_a_load_counted_elsewhere(trace: Path, skewed: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--pin .*: 1 layers of 8 experts, .* has 2 of 8"):
        laid_out(trace, Settings(Layout(1, 2), "eplb", counted=skewed))
    record(tmp_path / "other", T=8)
    here = laid_out(trace, Settings(Layout(1, 2), "eplb", counted=tmp_path / "other"))
    own = laid_out(trace, Settings(Layout(1, 2), "eplb"))
    assert not np.array_equal(here.slots.experts_LS, own.slots.experts_LS)


def test_what_a_capacity_left_out_does_not_travel(tmp_path: Path) -> None:
    one = routing(100, 8, 2, 0)
    kept = torch.arange(200).view(100, 2) % 3 > 0
    for name, recorded in (("kept", ("kept",)), ("all", ())):
        with Recorder(tmp_path / name, layers=[0], num_experts=8, num_experts_per_tok=2, recorded=recorded) as recorder:
            recorder.add({0: replace(one, kept=kept)}, -1, sequence=0, position=0, phase=Phase.TRAINING, step=0)
    rows = [laid_out(tmp_path / name, Settings(Layout(1, 4))).exchange.pairs_LWR.sum() for name in ("kept", "all")]
    assert rows == [int(kept.sum()), 200]


def test_time_is_what_the_busiest_rank_moves(trace: Path) -> None:
    """By hand: α for each collective, and each pass's busiest rank's rows out and back."""
    network = Network(latency=1e-3, bandwidth=1e6)
    report = laid_out(trace, Settings(Layout(1, 4), row_bytes=(100, 200), network=network))
    by_layer = report.described()["by_layer"]
    for way, extra in (("by_pairs", 0), ("by_tokens", 2 * PER_CHOICE)):
        rows = sum(layer[way]["busiest"] for layer in by_layer)
        expected = 2 * COLLECTIVES[way] * 1e-3 + rows / 65 * (100 + extra + 200) / 1e6
        assert report.seconds(way) == pytest.approx(expected)
    assert report.seconds("by_nodes") is None
    half = replace(report, settings=replace(report.settings, network=Network(latency=0, bandwidth=1e6, duplex=False)))
    rows = sum(layer["by_pairs"]["busiest_both_ways"] for layer in by_layer) / 2
    assert half.seconds("by_pairs") == pytest.approx(rows / 65 * 300 / 1e6)
    text = run(trace, "--layout", "1x4", "--network", "1ms,1MB/s", "--row-bytes", "100,200")
    assert f"by_pairs   {show(report.seconds('by_pairs'), 's')}" in text


def test_a_named_machine_has_two_ways(trace: Path) -> None:
    found = json.loads(run(trace, "--layout", "1x8", "--node", 2, "--network", "h800", "--row-bytes", "4kB", "--json"))
    assert found["network"]["bandwidth"] == 50e9 and found["links"]["bandwidth"] == 200e9
    assert set(found["pass_seconds"]) == {"by_pairs", "by_tokens", "by_nodes"}
    inside = json.loads(run(trace, "--layout", "1x8", "--network", "h800", "--row-bytes", "4kB", "--json"))
    assert inside["network"]["bandwidth"] == 200e9 and inside["links"] is None, "8 ranks are one node"


def test_a_measured_network_is_read(trace: Path, tmp_path: Path) -> None:
    (tmp_path / "net.json").write_text(Network(latency=1e-4, bandwidth=2e9, ranks=2, source="here").model_dump_json())
    found = json.loads(
        run(trace, "--layout", "1x2", "--network", tmp_path / "net.json", "--row-bytes", "256", "--json")
    )
    kept = {"format": "manyhands network", "latency": 1e-4, "bandwidth": 2e9, "duplex": True}
    assert found["network"] == {**kept, "ranks": 2, "source": "here"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layout", "4"], "expected DPxEP"),
        (["--layout", "0x4"], "expected DPxEP"),
        (["--layout", "1x3"], "3 ranks do not divide 8 experts"),
        (["--layout", "1x4", "--redundant", "4"], "needs --placement eplb"),
        (["--layout", "1x4", "--redundant", "3", "--placement", "eplb"], "11 slots .* 4 redundant ones would do"),
        (["--layout", "1x4", "--placement", "best"], "expected one of contiguous, eplb"),
        (["--layout", "1x4", "--groups", "3", "--placement", "eplb"], "3 groups do not divide 8 experts"),
        (["--layout", "1x4", "--groups", "2"], "--groups 2 is for --placement eplb"),
        (["--layout", "1x8", "--node", "3"], "--node 3 does not divide the 8 ranks"),
        (["--layout", "1x4", "--budgets", "1GB"], "--budgets is about caches"),
        (["--layout", "1x4", "--row-bytes", "1kB"], "--row-bytes goes with --network"),
        (["--layout", "1x4", "--network", "1,2"], "LATENCY,RATE like 20us,5GB/s"),
        (["--layout", "1x4", "--network", "1us,fast"], "--network fast"),
        (["--layout", "1x4", "--network", "none.json"], "none.json: cannot be read"),
        (["--layout", "1x4", "--network", "m4-max"], "no link between devices is known"),
        (["--layout", "1x4", "--network", "1us,1GB/s", "--row-bytes", "1,2,3"], "one size, or two"),
        (["--layout", "1x4", "--sequences", "65"], "has 64 tokens"),
        (["--layout", "99999x8"], "numbers for each pass"),
        (["--redundant", "4"], "--redundant goes with --layout"),
    ],
)
def test_misuse_is_one_line(trace: Path, options: list[str], message: str) -> None:
    with pytest.raises(ManyhandsError, match=message):
        CliRunner().invoke(app, ["simulate", str(trace), *options], catch_exceptions=False)
