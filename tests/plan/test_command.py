"""`manyhands plan` and `doctor` as a person uses them."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from math import comb
from pathlib import Path
from typing import Any

import pytest

from manyhands.catalog import entries
from manyhands.config.parallel import Layout
from manyhands.plan.count_shape import count_shape
from manyhands.simulate.exchange import exchanged
from manyhands.simulate.tokens import Tokens
from manyhands.trace.placement import contiguous
from manyhands.trace.recording import Trace

from ..small_runs import manyhands
from ..trace.traces import record


@pytest.fixture(autouse=True)
def nothing_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "80")


def as_json(*arguments: str) -> dict[str, Any]:
    done = manyhands("plan", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def figure(report: dict[str, Any], section: str, label: str) -> float:
    found = [f["value"] for f in report["sections"][section]["figures"] if f["label"] == label]
    assert len(found) == 1, label
    return float(found[0])


@pytest.mark.parametrize(
    "arguments",
    [["plan", "deepseek-v3"], ["plan", "--help"], ["plan", "kimi-k2.5", "--json"], ["choose", "--memory", "16GB"]],
)
def test_needs_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys; sys.argv = ['manyhands', *sys.argv[1:]]\n"
        "from manyhands.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'numpy', 'safetensors', 'matplotlib', 'rich'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_figures_of_v3_on_the_screen() -> None:
    """As the papers print them: 671 B, 37 B, 250 GFLOPs of training per token, 70.27 kB of cache."""
    done = manyhands("plan", "deepseek-v3")
    assert done.returncode == 0, done.stderr
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    for expected in (
        "total 671.0 B 256 experts, 8 per token, in 58 layers",
        "active 37.55 B with input embedding and head",
        "active, without embedding 36.63 B the N of 2·N FLOPs",
        "active, body only 35.70 B neither embedding nor head",
        "4k 93.72 GFLOP 21.8% 142.8 GFLOP 250.5 GFLOP",
        "fp8 (native) 8.002/8.002/16/16 673.2 GB 673.4 GB",
        "per token 70.27 kB 70,272 bytes at 16 bits",
        "8 57.42 166.2 GB 20.78 GB",
    ):
        assert expected in lines
    assert max(map(len, done.stdout.splitlines())) <= 100


@pytest.mark.parametrize("name", ["mixtral-8x7b", "gpt-oss-120b", "llama-3.1-405b", "switch-c", "jamba-v0.1", "tiny"])
def test_every_kind_of_model_fits_80_columns(name: str) -> None:
    done = manyhands("plan", name, "--machine", "h100x8")
    assert done.returncode == 0, done.stderr
    body = done.stdout.split("\n\n", 1)[1]
    assert all(len(line) <= 80 for line in body.splitlines()), [line for line in body.splitlines() if len(line) > 80]


def test_training_cost_of_v3() -> None:
    """2.788 M hours at 2 USD are the 5.576 M USD of arXiv 2412.19437, table 1."""
    report = as_json("deepseek-v3", "--machine", "h800", "--tokens", "14.8T", "--gpu-hours", "2.788M", "--price", "2")
    assert figure(report, "training", "cost") == pytest.approx(5.576e6)
    assert figure(report, "training", "in total") == pytest.approx(3.707e24, rel=1e-3)
    assert figure(report, "training", "utilisation") == pytest.approx(0.373, abs=0.002)


def test_a_cost_needs_no_machine() -> None:
    report = as_json("deepseek-v3", "--tokens", "14.8T", "--gpu-hours", "2.788M", "--price", "2")
    assert figure(report, "training", "cost") == pytest.approx(5.576e6)


def test_side_by_side() -> None:
    report = as_json("deepseek-v3", "--versus", "llama-3.1-405b", "--machine", "h100x16")
    rows = {row["figure"]: row for row in report["sections"]["compute"]["table"]}
    ratios = {name: 1 / row["ratio"]["value"] for name, row in rows.items()}
    assert ratios["training, 4k"] == pytest.approx(9.87, abs=0.01)
    assert ratios["forward, 32k"] == pytest.approx(4.55, abs=0.01)
    assert ratios["forward, 128k"] == pytest.approx(2.60, abs=0.01)
    assert ratios["decoding, 32k"] == pytest.approx(1.71, abs=0.01)
    assert ratios["decoding, 128k"] < 1, "decoding from latents costs more than the dense model's attention"
    text = manyhands("plan", "deepseek-v3", "--versus", "llama-3.1-405b").stdout
    assert "671.0 B         405.9 B" in text and "1/9.87" in text


def test_three_side_by_side() -> None:
    """Each model keeps its own figures: those that it has beside one other."""
    names = ("deepseek-v3", "llama-3.1-405b", "mixtral-8x7b")
    report = as_json(names[0], "--versus", names[1], "--versus", names[2], "--machine", "h100x16")
    assert [model["name"] for model in report["models"]] == ["DeepSeek-V3", "Llama 3.1 405B", "Mixtral 8x7B"]
    for key, other in (("second", names[1]), ("third", names[2])):
        pair = as_json(names[0], "--versus", other, "--machine", "h100x16")["sections"]
        for section in ("parameters", "memory", "compute", "cache", "reading", "speed"):
            found = {row["figure"]: row for row in report["sections"][section]["table"]}
            for row in pair[section]["table"]:
                assert found[row["figure"]]["first"] == row["first"] and "ratio" not in found[row["figure"]]
                assert found[row["figure"]][key] == row["second"]
        told = [note.split(": ", 1) for note in report["sections"]["turns"]["notes"]]
        about = next(model["name"] for model in report["models"] if model["name"].lower().startswith(other[:5]))
        assert [note for who, note in told if who == f"DeepSeek-V3 and {about}"] == pair["turns"]["notes"]
    done = manyhands("plan", names[0], *(["--versus", "mixtral-8x7b"] * 6))
    assert done.returncode == 2 and "at most 6 models" in done.stderr


def test_scale_and_law() -> None:
    report = as_json("deepseek-v3", "--machine", "h800x64", "--scale", "--devices", "64", "--flops", "1e20")
    (row,) = report["sections"]["parallel"]["table"]
    assert row["copies"]["value"] == 3.5
    assert row["dispatch"]["value"] == pytest.approx(106e6, rel=5e-3)
    assert row["combine"]["value"] == pytest.approx(4.1e-3, rel=0.01)
    law = {row["experts"]: row for row in report["sections"]["law"]["table"]}
    assert law["8"]["active"]["value"] == pytest.approx(0.99e9, rel=0.01)


def test_the_node_limit_counts_groups() -> None:
    """V3: 4 of 8 groups. 16 nodes hold half a group each, so at most 8 nodes; K2 has no groups and no limit."""
    (row,) = as_json("deepseek-v3", "--machine", "h800", "--scale", "--devices", "128")["sections"]["parallel"]["table"]
    assert row["copies"]["value"] == pytest.approx(16 * (1 - comb(240, 8) / comb(256, 8)) * 15 / 16)
    (row,) = as_json("kimi-k2", "--machine", "h800", "--scale", "--devices", "64")["sections"]["parallel"]["table"]
    assert row["copies"]["value"] == pytest.approx(8 * (1 - comb(336, 8) / comb(384, 8)) * 7 / 8)


def test_a_trace_says_how_uneven_devices_are(tmp_path: Path) -> None:
    """All of its tokens as one pass, on each number of devices: what `simulate --layout` counts."""
    record(tmp_path / "trace", T=100, layers=tuple(range(32)))
    options = ("mixtral-8x7b", "--machine", "h100", "--scale", "--trace", str(tmp_path / "trace"))
    sections = as_json(*options)["sections"]
    (two, four, eight) = sections["parallel"]["table"]
    tokens = Tokens.of(Trace.open(tmp_path / "trace"))
    tokens = replace(tokens, step=tokens.step * 0)
    for row, devices in ((two, 2), (four, 4), (eight, 8)):
        found = exchanged(tokens, contiguous(32, 8, devices), Layout(1, devices))
        assert row["copies"]["value"] == pytest.approx(found.by_tokens.remote_L.sum() / 32 / 200)
        assert row["busiest load"]["value"] == pytest.approx(found.load_L.mean())
        assert row["busiest rows"]["value"] == pytest.approx(found.port_L(found.by_tokens).mean())
    assert all(row["busiest"]["value"] > 0 for row in sections["scale_out"]["table"] if row["ep"]["value"] > 1)
    text = manyhands("plan", *options).stdout
    assert "200 tokens of" in " ".join(text.split()) and "busiest load" in text


def test_explain_prints_the_numbers_and_the_source() -> None:
    text = " ".join(manyhands("plan", "deepseek-v3", "--explain").stdout.split())
    assert "forward FLOPs = 2·N + Σ_layers 2·min(c, window)·H·(d_qk + d_v) [arXiv 2001.08361 §2.1]" in text
    assert "4k, forward = 2·36,625,603,584 + 20,468,203,520 (attention) = 93.72 GFLOP" in text
    assert "8, experts/layer = 256·(1 - (1 - 8/256)^8) = 57.42" in text


def test_offloading_and_prices() -> None:
    report = as_json("mixtral-8x7b", "--machine", "desktop-ddr5", "--format", "int4", "--price", "0.5")
    rows = {row["hit rate"]: row["in turn"]["value"] for row in report["sections"]["offload"]["table"]}
    assert rows["0%"] < rows["50%"] < rows["100%"]
    assert figure(report, "offload", "experts that fit in memory") == 1
    batch_1, batch_64 = (figure(report, "price", f"10^6 tokens out, batch {n}") for n in (1, 64))
    assert batch_64 < batch_1


def test_what_is_not_known_is_not_said() -> None:
    """Without a matrix rate, reading bounds decoding; of prefill it says nothing."""
    rows = as_json("qwen3-30b-a3b", "--machine", "m4-max", "--price", "1")["sections"]
    prefill = rows["speed"]["table"][-1]
    assert prefill["all"]["value"] is None and prefill["limited by"] == "matrix rate unknown"
    assert not [found for found in rows["price"]["figures"] if "in" in found["label"].split()]


def test_every_figure_names_its_unit_and_json_is_complete() -> None:
    report = as_json(
        "gpt-oss-120b", "--machine", "h100x2", "--tokens", "1T", "--scale", "--flops", "1e20", "--price", "2"
    )
    assert set(report["sections"]) == {
        "parameters",
        "compute",
        "memory",
        "cache",
        "reading",
        "speed",
        "expected",
        "price",
        "training",
        "parallel",
        "scale_out",
        "law",
    }
    assert report["models"][0]["counts"]["total"] == 116_829_156_672
    for section in report["sections"].values():
        assert all("unit" in found and "value" in found for found in section["figures"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "not in the catalogue"),
        (["mixtral-8x7b", "--machine", "h10"], "unknown machine 'h10'"),
        (["mixtral-8x7b", "--format", "int5"], "unknown format 'int5'"),
        (["mixtral-8x7b", "--bits", "routed=x"], "'x' is not a number"),
        (["mixtral-8x7b", "--bits", "gates=4"], "expected CLASS=BITS"),
        (["mixtral-8x7b", "--bits", "routed=nan"], "between 0.5 and 64"),
        (["mixtral-8x7b", "--context", "0"], "--context '0'"),
        (["mixtral-8x7b", "--context", "many"], "--context 'many'"),
        (["mixtral-8x7b", "--tokens", "-3"], "--tokens '-3'"),
        (["mixtral-8x7b", "--flops", "1e300"], "--flops '1e300'"),
        (["mixtral-8x7b", "--scale"], "this needs a machine"),
        (["mixtral-8x7b", "--price", "2"], "this needs a machine"),
        (["mixtral-8x7b", "--price", "nan", "--machine", "h100"], "--price nan"),
        (["mixtral-8x7b", "--machine", "h100", "--scale", "--devices", "3"], "does not divide the 8 experts"),
        (["kimi-k2", "--machine", "h100", "--scale", "--devices", "12"], "no whole number of nodes"),
        (["mixtral-8x7b", "--load", "/no/such/file"], "/no/such/file"),
        (["switch-c", "--load", "/no/such/file"], "--load has no meaning for Switch-C"),
        (["switch-c", "--tokens", "1T"], "--tokens has no meaning for .*: only parameters, memory and FLOPs are"),
        (["jacobs-1991", "--scale"], "--scale has no meaning for .*: only parameters and memory are planned"),
        (["llama-3.1-405b", "--scale", "--machine", "h100"], "is dense"),
        (["mixtral-8x7b", "--versus", "dbrx", "--tokens", "1T"], "--tokens is about one model"),
        (["mixtral-8x7b", "--devices", "8"], "--devices goes with --scale"),
        (["mixtral-8x7b", "--network", "1us,1GB/s"], "--network goes with --scale"),
        (["mixtral-8x7b", "--machine", "m4-max", "--scale"], "no link between devices is known .* --network"),
        (["mixtral-8x7b", "--machine", "h100", "--scale", "--network", "h100"], "come with --machine h100"),
        (["mixtral-8x7b", "--machine", "h100", "--scale", "--network", "rtx-4090"], "come with --machine rtx-4090"),
        (["mixtral-8x7b", "--trace", "x"], "--trace goes with --memory or --scale"),
        (["mixtral-8x7b", "--machine", "h100", "--scale", "--trace", "x"], "x: not a directory"),
        (["mixtral-8x7b", "--machine", "h100", "--scale", "--trace", "x", "--imbalance", "2"], "leave one of them out"),
        (["mixtral-8x7b", "--gpu-hours", "8"], "--gpu-hours goes with --tokens"),
        (["mixtral-8x7b", "--plot", "x.txt"], "must end in"),
    ],
)
def test_mistakes_end_in_one_line(arguments: list[str], message: str) -> None:
    done = manyhands("plan", *arguments)
    assert done.returncode == 2 and done.stdout == "", done.stdout
    assert re.search(message, done.stderr) and len(done.stderr.splitlines()) == 1


def test_names_in_a_plot_are_apart_and_curves_end_where_the_model_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    versus = ("--versus", "deepseek-v3", "--versus", "t5-large")
    done = manyhands("plan", "olmoe-1b-7b", *versus, "--plot", str(tmp_path / "a.png"))
    assert done.returncode == 0, done.stderr
    monkeypatch.undo()
    (figure,) = figures
    catalogue, by_context = figure.axes[:2]
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in catalogue.texts] + [catalogue.get_legend().get_window_extent()]
    assert len(boxes) >= 6
    assert not any(one.overlaps(two) for number, one in enumerate(boxes) for two in boxes[:number])
    ends = [int(line.get_xdata()[-1]) for line in by_context.lines]
    assert ends == [4096, 131072, 131072], "OLMoE's context, what is drawn of DeepSeek-V3's, and nothing of T5's"
    names = [text.get_window_extent() for text in catalogue.texts if text.get_text().count("-")]
    points = [p for found in catalogue.collections for p in catalogue.transData.transform(found.get_offsets())]
    assert len(names) >= 3 and not any(name.contains(*point) for name in names for point in points)
    for panel in figure.axes[1:]:
        legend = panel.get_legend().get_window_extent()
        drawn = [p for line in panel.lines for p in panel.transData.transform(line.get_xydata())]
        assert not any(legend.contains(*point) for point in drawn), "a legend covers no curve"
        assert 3 <= len([t for t in panel.get_yticklabels() if t.get_text()]) <= 12
    dense = next(points for points in catalogue.collections if points.get_label() == "dense")
    totals = {count_shape(entry.shape).total for entry in entries() if entry.id in ("t5-base", "t5-11b")}
    assert len(totals) == 2 and totals <= {int(x) for x, _ in dense.get_offsets()}, "an encoder-decoder is no mixture"
    pyplot.close(figure)


def test_plot_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = manyhands("plan", "olmoe-1b-7b", "--plot", str(tmp_path / "a.png"))
    assert done.returncode == 2 and done.stderr.startswith("manyhands: --plot needs matplotlib")


@pytest.mark.parametrize(("name", "start"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.pdf", b"%PDF")])
def test_a_plot_replaces_plots_only(tmp_path: Path, name: str, start: bytes) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / name
    arguments = ("plan", "olmoe-1b-7b", "--machine", "desktop-ddr5", "--plot", str(path))
    path.write_bytes(b"\x89PNG somebody's holiday " * 20_000)
    done = manyhands(*arguments)
    assert done.returncode == 2 and "was not made by this program, so it stays" in done.stderr
    assert path.read_bytes().startswith(b"\x89PNG somebody")
    path.unlink()
    assert manyhands(*arguments).returncode == 0 and path.read_bytes().startswith(start)
    assert manyhands(*arguments).returncode == 0  # its own is drawn again


def test_json_keys_are_the_same_for_every_machine_and_model_and_have_one_unit() -> None:
    shapes = []
    for arguments in (["mixtral-8x7b", "--machine", "h100x8"], ["qwen3-30b-a3b", "--machine", "h200"]):
        for extra in ([], ["--versus", "llama-3.1-405b"]):
            sections = as_json(*arguments, *extra)["sections"]
            units: dict[tuple[str, str], set[str]] = {}
            for name, section in sections.items():
                for row in section.get("table", []):
                    for key, cell in row.items():
                        if isinstance(cell, dict):
                            units.setdefault((name, key), set()).add(cell["unit"])
                        if key == "fits":
                            assert isinstance(cell, bool)
            assert all(len(found) == 1 for found in units.values()), units
            shapes.append({key for key in units if key[0] in ("speed", "parameters", "memory")})
    assert shapes[0] == shapes[2] and shapes[1] == shapes[3]
