"""The whole of it, on a trace on disk and on another engine's file."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from manyhands.cli.main import app
from manyhands.errors import DataError, UserError
from manyhands.simulate.replay import Tally, replay
from manyhands.simulate.report import Report, Settings, simulated
from manyhands.simulate.sweep import speed
from manyhands.simulate.tokens import Tokens
from manyhands.simulate.union import union_curve
from manyhands.simulate.wants import Wants
from manyhands.store.policies import Lfu
from manyhands.trace.recording import Trace
from tests.simulate.small import some_tokens
from tests.trace.traces import record

SIZES = (1_000, 3_000)


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 tokens of a prompt, 20 decoded; layers 1 and 3, 2 of 8 experts."""
    path = tmp_path_factory.mktemp("simulate") / "trace"
    record(path, record_bytes=SIZES, dense_bytes=500)
    return path


def by_hand(trace: Path, budget: int) -> dict[str, int]:
    """Lfu asked directly, pass by pass."""
    chosen, found = Lfu(budget, SIZES), {"lookups": 0, "hits": 0, "read_bytes": 0}
    for rows in Trace.open(trace).steps():
        for layer in range(2):
            decision = chosen.want(layer, sorted(set(rows.expert_ids[:, layer].ravel().tolist())))
            if rows.phase[0] == 1:
                found["lookups"] += len(decision.hits) + len(decision.misses)
                found["hits"] += len(decision.hits)
                found["read_bytes"] += len(decision.misses) * SIZES[layer]
        chosen.end_step()
    return found


@pytest.mark.parametrize("budget", [2_000, 8_000, 32_000])
def test_a_row_is_what_the_policy_says(trace: Path, budget: int) -> None:
    report = simulated(trace, Settings(policies=["lfu"], budgets=[budget]))
    decode = report.rows[0].result.decode
    assert by_hand(trace, budget) == {name: getattr(decode, name) for name in ("lookups", "hits", "read_bytes")}
    assert decode.tokens == decode.steps == 20 and report.rows[0].result.other.tokens == 20


def test_defaults_double_from_a_quarter_of_one_token(trace: Path) -> None:
    report = simulated(trace, Settings())
    assert report.cycle_bytes == 2 * sum(SIZES) and report.all_bytes == 8 * sum(SIZES)
    assert list(dict.fromkeys(row.budget_bytes for row in report.rows)) == [2_000, 4_000, 8_000, 16_000]
    assert [row.policy for row in report.rows[:4]] == ["lfu", "lru", "pinned", "belady"]
    assert all(row.of_belady == 1 for row in report.rows if row.policy == "belady" and row.result.decode.hits)


def test_a_share_of_all_experts_is_a_budget(trace: Path) -> None:
    rows = simulated(trace, Settings(policies=["lru"], budgets=[0.5, 1.0])).rows
    assert [row.budget_bytes for row in rows] == [16_000, 32_000]


def test_sequences_share_a_pass(trace: Path) -> None:
    report = simulated(trace, Settings(policies=["lru"], budgets=[1], sequences=4))
    assert report.cut and report.rows[0].tally.steps == 5 and report.rows[0].tally.tokens == 20
    alone = simulated(trace, Settings(policies=["lru"], budgets=[1], sequences=1))
    assert report.rows[0].tally.bytes_per_token < alone.rows[0].tally.bytes_per_token == 2 * sum(SIZES)


def test_only_the_first_tokens(trace: Path) -> None:
    report = simulated(trace, Settings(policies=["lru"], budgets=[1], max_tokens=25))
    assert (report.replayed_tokens, report.recorded_tokens) == (25, 40)
    assert report.rows[0].result.all.tokens == 25


def test_speed_is_time_of_disk_and_memory() -> None:
    tally = Tally(steps=5, tokens=10, lookups=0, hits=0, wanted_bytes=4_000, read_bytes=1_000)
    found = speed(tally, disk=100.0, memory=500.0, dense_bytes=200)
    assert found.roofline == pytest.approx(10 / 10) and found.forecast == pytest.approx(10 / (10 + 5_000 / 500))
    assert speed(tally, 100.0, None, 200).forecast == 1.0
    assert speed(Tally(tokens=1), 100.0, None, 0).roofline == float("inf")


def test_union_of_the_same_token_text_by_text() -> None:
    """All tokens alike: a batch wants what one token wants, and a token's share falls as 1/B."""
    tokens = some_tokens(T=40, prompt=1)
    alike = Tokens(np.broadcast_to(tokens.expert_ids[:1], tokens.expert_ids.shape), *_rest(tokens))
    found = union_curve(alike, [1, 1, 1], 8)
    assert [one.batch for one in found] == [1, 2, 4, 8, 16, 32]
    assert [one.bytes_per_token for one in found] == pytest.approx([1 / one.batch for one in found])


def test_union_of_all_tokens_is_exact() -> None:
    tokens = some_tokens(T=9, prompt=1)  # 8 decoded: a batch of 8 is all of them
    found = union_curve(tokens, [1, 1, 1], 8)
    wants = Wants.of(Tokens(tokens.expert_ids[1:], np.zeros(8, np.int32), *_rest(tokens, 1)[1:]), [1, 1, 1])
    assert found[-1].batch == 8 and found[-1].experts_per_step == pytest.approx(wants.sizes.sum())


def _rest(tokens: Tokens, first: int = 0) -> tuple:
    return tokens.step[first:], tokens.sequence[first:], tokens.decode[first:], tokens.none


def test_another_engines_file_is_read(tmp_path: Path) -> None:
    lines = ["# route_trace v1", "# model=m arch=x n_layer=2 n_expert=4 n_expert_used=1"]
    lines += [f"# layer={layer} expert_bytes=100 dense_bytes=10" for layer in (0, 1)]
    lines += ["turn,phase,step,layer,slot,expert,weight,residency,expert_bytes"]
    lines += [f"0,0,{t},{layer},0,{t},1.0,0,100" for layer in (0, 1) for t in (0, 1)]
    lines += [f"0,1,{t},{layer},0,1,1.0,0,100" for t in (2, 3, 4) for layer in (0, 1)]
    (tmp_path / "route.csv").write_text("\n".join(lines) + "\n")
    report = simulated(tmp_path / "route.csv", Settings(policies=["lru"], budgets=[400]))
    assert vars(report.rows[0].result.other)["lookups"] == 4 and report.rows[0].result.decode.hits == 6
    assert report.dense_bytes == 20


def test_no_sizes_no_simulation(tmp_path: Path) -> None:
    record(tmp_path / "trace")
    with pytest.raises(UserError, match="give --record-bytes"):
        simulated(tmp_path / "trace", Settings())
    assert simulated(tmp_path / "trace", Settings(record_bytes=10)).cycle_bytes == 40


def test_pins_of_another_model_are_refused(trace: Path, tmp_path: Path) -> None:
    record(tmp_path / "other", E=9)
    with pytest.raises(UserError, match=r"2 layers of 9 experts, .* has 2 of 8"):
        simulated(trace, Settings(pin=tmp_path / "other"))
    record(tmp_path / "same")
    assert simulated(trace, Settings(policies=["pinned"], pin=tmp_path / "same")).rows


def test_not_a_trace(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="trace"):
        simulated(tmp_path, Settings())


def test_a_description_of_absurd_size_costs_nothing(trace: Path, tmp_path: Path) -> None:
    record(tmp_path / "trace", T=2)
    told = tmp_path / "trace" / "trace.json"
    values = json.loads(told.read_text()) | {"layers": list(range(4096)), "num_experts": 65_534}
    (tmp_path / "trace" / "manifest.json").unlink()
    told.write_text(json.dumps(values))
    with pytest.raises(DataError, match="4,096 layers of 65,534 experts; a simulation takes 1,048,576 experts in all"):
        simulated(tmp_path / "trace", Settings(record_bytes=10))


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["simulate", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_the_table_and_the_json_agree(trace: Path) -> None:
    options = (trace, "--policies", "lfu,belady", "--budgets", "8kB,50%", "--disk", "1MB/s", "--memory-rate", "1GB/s")
    found = json.loads(run(*options, "--json"))
    assert [(row["policy"], row["budget_bytes"]) for row in found["rows"]] == [
        *(("lfu", 8_000), ("belady", 8_000)),
        *(("lfu", 16_000), ("belady", 16_000)),
    ]
    assert found["rows"][0]["decode"]["hits"] == by_hand(trace, 8_000)["hits"]
    lines = [line for line in run(*options).splitlines() if " lfu " in line]
    assert f"{100 * found['rows'][0]['decode']['hit_rate']:.1f}" in lines[0].split()
    assert f"{found['rows'][0]['speed'][0]['forecast']:.2f}" in lines[0].split()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--policies", "arc"], "no cache policy 'arc': lfu, lru, pinned, belady"),
        (["--policies", ","], "expected 1 to 64 values"),
        (["--budgets", "0%"], "above 0%"),
        (["--budgets", "much"], "like 512MB"),
        (["--disk", "fast"], "--disk fast"),
        (["--sequences", "21"], "has 20 tokens"),
        (["--plot", "a.gif"], r"must end in .png"),
    ],
)
def test_misuse_is_one_line(trace: Path, options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CliRunner().invoke(app, ["simulate", str(trace), *options], catch_exceptions=False)


def test_replay_needs_a_new_policy_each_time(trace: Path) -> None:
    """Twice through the same policy finds what the first time left: replay does not reset it."""
    wants = Wants.of(Tokens.of(Trace.open(trace)), SIZES)
    chosen = Lfu(32_000, SIZES)
    assert replay(chosen, wants).all.hits < replay(chosen, wants).all.hits


def test_picture(trace: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from manyhands.simulate.plot import draw

    report: Report = simulated(trace, Settings(disks=[1e6, 2e6], memory=1e9))
    draw(tmp_path / "a.svg", report)
    draw(tmp_path / "a.svg", report)  # its own picture may be replaced
    assert b"manyhands simulate" in (tmp_path / "a.svg").read_bytes()
    (tmp_path / "b.svg").write_bytes(b"mine")
    with pytest.raises(UserError):
        draw(tmp_path / "b.svg", report)
