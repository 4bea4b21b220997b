"""`manyhands choose` as a person uses it."""

import json
import math
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

from manyhands.errors import ConfigError
from manyhands.plan.here import Here, machine_key
from manyhands.plan.host import cache_file
from manyhands.plan.report.chosen_plot import check_plot
from manyhands.store.policies import Lfu
from manyhands.trace.part import Phase
from manyhands.trace.recording import Recorder

from ..plan.test_fit import PLAIN
from ..small_runs import manyhands

PAGE = (Path(__file__).parents[2] / "docs" / "choosing.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```\n\$ manyhands (choose [^\n]+)\n(.+?)```", PAGE, flags=re.DOTALL)
COMMANDS = re.findall(r"^manyhands (choose[^#\n]*)", PAGE, flags=re.MULTILINE)


@pytest.fixture(autouse=True)
def eighty_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.parametrize(("command", "lines"), BLOCKS, ids=[command for command, _ in BLOCKS])
def test_the_page_shows_what_is_printed(command: str, lines: str) -> None:
    done = manyhands(*shlex.split(command))
    assert done.returncode == 0, done.stderr
    printed = done.stdout.splitlines()
    assert [line for line in lines.splitlines() if line not in printed] == []


@pytest.mark.parametrize("command", [c.strip() for c in COMMANDS if "--trace" not in c and len(c.split()) > 1])
def test_the_pages_commands_run(command: str, tmp_path: Path) -> None:
    done = manyhands(*shlex.split(command), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    if "--json" not in command:
        assert all(len(line) <= 80 for line in done.stdout.splitlines()), max(done.stdout.splitlines(), key=len)


def keys(value: object) -> set[str]:
    if isinstance(value, dict):
        return set(value) | {key for each in value.values() for key in keys(each)}
    return {key for each in value for key in keys(each)} if isinstance(value, list) else set()


def test_the_schema_is_the_pages() -> None:
    """Every key is described, every described key is there, none is a name of a model or machine."""
    done = manyhands("choose", "--machine", "any", "--price", "2", "--json")
    answer = json.loads(done.stdout)
    assert answer["schema"] == "manyhands.choose/1" and answer["considered"] > 20_000, "all on all"
    table = PAGE.split("## JSON", 1)[1]
    described = set(re.findall(r"`([a-z_]+)`", table.split("\n## ")[0]))
    assert keys(answer) - described == set() and {key for key in described if "_" in key} - keys(answer) == set()


def test_nothing_is_an_answer_too() -> None:
    done = manyhands("choose", "deepseek-v3", "--machine", "raspberry-pi-5")
    assert done.returncode == 0 and "Nothing keeps all that was asked" in done.stdout
    assert "without experts" in done.stdout and "tok/s" not in done.stdout


def test_a_machine_in_a_file_and_its_own_reserve(tmp_path: Path) -> None:
    (tmp_path / "box.toml").write_text('memory = "32GiB"\nbandwidth = "100GB/s"\nreserve = "8GiB"\ndevices = 2\n')
    options = ("choose", "olmoe-1b-7b", "--machine", str(tmp_path / "box.toml"), "--price", "box=1.5", "--json")
    answer = json.loads(manyhands(*options).stdout)
    assert {each["usable_bytes"] for each in answer["offers"]} == {2 * 24 * 2**30}
    assert {each["usd_per_hour"] for each in answer["offers"]} == {3.0}


def test_this_machine_is_the_one_that_was_measured_and_its_memory_stands_beside_its_gpu() -> None:
    """No argument at all; the experts that its card cannot hold lie in the memory that was measured with it."""
    cpu = PLAIN.model_copy(update={"name": "here", "disk": 1e9})
    gpu = cpu.model_copy(update={"kind": "gpu", "memory": 20e9, "bandwidth": 1e12})
    values = {"key": machine_key(), "measured": "2026-11-28T00:00:00+00:00", "machine": gpu, "processor": cpu}
    here = Here(**values, cpu="a processor", cores=2, threads=2, features=())
    cache_file().parent.mkdir(parents=True)
    cache_file().write_text(here.model_dump_json())
    answer = json.loads(manyhands("choose", "--min-total", "100B", "--json").stdout)
    found = {each["model"]: each for each in answer["offers"]}["gpt-oss-120b"]
    assert found["machine"] == "here" and found["layout"] == "host" and found["host_bytes_per_second"] == 5e10
    assert found["usable_bytes"] == pytest.approx(19e9)
    assert found["experts_device_bytes"] + found["experts_host_bytes"] == pytest.approx(60.9e9, rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--machine", "h10"], "unknown machine 'h10'"),
        (["--memory", "16"], "--memory 16: expected at least 64MB, such as 16GB"),
        (["--memory", "lots"], "--memory lots: expected a size"),
        (["--memory", "16GB", "--machine", "h100", "--machine", "a100"], "--memory is about one machine"),
        (["--machine", "any", "--machine", "h100"], "leave the others out"),
        (["mixtral"], "mixtral-8x7b"),
        (["t5-base"], "only decoders have speeds"),
        (["mixtral-8x7b", "--min-total", "3B"], "leave MODEL out"),
        (["--memory", "16GB", "--min-total", "many"], "--min-total 'many'"),
        (["--memory", "16GB", "--license", "beerware"], "no model of the catalogue"),
        (["--memory", "16GB", "--per-hour", "2"], "a budget needs prices"),
        (["--memory", "16GB", "--price", "h100=2"], "h100 is not among the machines"),
        (["--machine", "h100", "--price", "free"], "expected USD per device"),
        (["--memory", "16GB", "--ttft", "0"], "--ttft 0: expected a number above 0"),
        (["--memory", "16GB", "--tokens-per-second", "nan"], "--tokens-per-second nan"),
        (["--memory", "16GB", "--context", "1k", "--tokens-in", "2k"], "2,048 tokens in and out need more"),
        (["--memory", "16GB", "--layout", "cloud"], "expected one of memory, host, disk"),
        (["--memory", "16GB", "--format", "q4_k_x"], "unknown format"),
        (["--machine", "rtx-4090", "--host", "h100"], "is a GPU"),
        (["--memory", "16GB", "--host", "desktop-ddr5"], "--host goes with a GPU"),
        (["--machine", "h100x8", "--devices", "4"], "h100x8 is 8 already"),
        (["--memory", "16GB", "--trace", "nowhere"], "--trace is of one model"),
        (["--memory", "16GB", "--plot", "a.gif"], ".png, .svg, .pdf"),
        (["--bandwidth", "10GB/s"], "--bandwidth goes with --memory or --machine"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], said: str) -> None:
    done = manyhands("choose", *arguments)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_the_picture_names_every_row_and_replaces_only_its_own(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path, other = tmp_path / "c.svg", tmp_path / "mine.svg"
    other.write_text("<svg/>")
    command = ("choose", "--memory", "16GB", "--rows", "2", "--plot")
    assert manyhands(*command, str(path)).returncode == 0
    check_plot(path)
    assert b"manyhands choose" in path.read_bytes()
    done = manyhands(*command, str(other))
    assert done.returncode == 2 and other.read_text() == "<svg/>"


def test_without_matplotlib_nothing_is_computed_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"needs matplotlib: pip install 'manyhands\[report\]'"):
        check_plot(tmp_path / "c.svg")


def test_numbers_in_the_picture_are_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of one size and speed lie on one point; each number is read all the same."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    done = manyhands("choose", "--memory", "16GB", "--plot", str(tmp_path / "c.png"))
    assert done.returncode == 0, done.stderr
    monkeypatch.undo()
    (figure,) = figures
    from matplotlib.text import Text  # of the number alone, without the line to its point

    figure.canvas.draw()
    ax, key = figure.axes
    numbers = [text for text in ax.texts if text.get_text().isdigit()]
    middles = [Text.get_window_extent(text) for text in numbers]
    middles = [((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2) for box in middles]
    assert len(middles) == len([t for t in key.texts if t.get_text().isdigit()]) >= 10
    assert all(math.dist(one, two) > 12 for n, one in enumerate(middles) for two in middles[:n])
    assert "16 GiB" in ax.get_title(loc="left") and "context" in ax.get_title(loc="left")
    pyplot.close(figure)


def test_a_recorded_hit_rate_is_the_policys_own(tmp_path: Path) -> None:
    """A trace of a model with 3 layers of 16 experts, in a machine with room for some of them."""
    from .test_plan_trace import CONFIG, EXPERT

    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((200, 3, 16)) + np.linspace(0, 1.5, 16), axis=-1)[..., :2]
    with Recorder(tmp_path / "trace", layers=[0, 1, 2], num_experts=16, num_experts_per_tok=2, recorded=()) as recorder:
        recorder.add_arrays(ids, sequence=0, position=np.arange(200), phase=Phase.DECODE, step=np.arange(200))
    box = tmp_path / "box.toml"
    common = ("choose", str(tmp_path / "config.json"), "--machine", str(box), "--format", "int4", "--disk", "1GB/s")
    common += ("--context", "64", "--json")
    box.write_text('memory = "1GiB"\nbandwidth = "1GB/s"\nreserve = 0\n')
    (whole,) = json.loads(manyhands(*common).stdout)["offers"]
    others = whole["weights_bytes"] + whole["cache_bytes"] + whole["working_bytes"] - 48 * EXPERT
    box.write_text(f'memory = {others + 12.5 * EXPERT}\nbandwidth = "100GB/s"\nreserve = 0\n')
    (found,) = json.loads(manyhands(*common, "--trace", str(tmp_path / "trace")).stdout)["offers"]
    policy, hits = Lfu(12, (1,) * 3), 0
    for step in ids:
        hits += sum(len(policy.want(layer, sorted(experts)).hits) for layer, experts in enumerate(step.tolist()))
        policy.end_step()
    seconds = {each["what"]: each["seconds"] for each in found["limits"]}
    assert found["layout"] == "disk" and seconds["disk"] == pytest.approx((1 - hits / 1200) * 6 * EXPERT / 1e9)
