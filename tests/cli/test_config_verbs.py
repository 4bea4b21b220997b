"""`config`, `presets`, `train --print-config` and `--dry-run`: what may be asked before anything is trained."""

import json
from pathlib import Path

import pytest

from manyhands.config.load import load_preset, load_run, preset_names
from manyhands.files import TRAIN_TOKENS
from manyhands.models import build
from manyhands.text import TokenFile
from manyhands.train.state import count_parameters

from ..small_runs import SMALL, manyhands, write_text


def test_config_finds_a_field_by_its_last_name() -> None:
    done = manyhands("config", "num_experts_per_tok")
    assert done.returncode == 0 and "model.moe.router.num_experts_per_tok\n" in done.stdout
    assert "default  2" in done.stdout and "integer ≥ 1 ≤ 65536" in done.stdout
    told = json.loads(manyhands("config", "learning_rate", "--json").stdout)
    assert [(one["field"], one["default"]) for one in told] == [("optim.lr", "0.003")]
    [told] = json.loads(manyhands("config", "balance.bias_update_rate", "--json").stdout)
    assert told["sources"] == ["arXiv 2408.15664"] and told["may_be"] == "number ≥ 0"


def test_config_of_a_section_has_what_is_in_it() -> None:
    names = [one["field"] for one in json.loads(manyhands("config", "schedule", "--json").stdout)]
    assert names[0] == "schedule" and {"schedule.kind", "schedule.warmup_steps"} <= set(names)


def test_config_lists_every_field_that_a_run_has() -> None:
    listed = {line.split()[0] for line in manyhands("config").stdout.splitlines()}
    dumped = load_preset("tiny").model_dump()
    paths = {f"{section}.{name}" for section in dumped if isinstance(dumped[section], dict) for name in dumped[section]}
    assert paths <= listed and len(listed) > 200


@pytest.mark.parametrize(("name", "said"), [("hidden_siz", "'model.hidden_size'"), ("zebra", "allowed: ")])
def test_config_of_no_field_is_one_line(name: str, said: str) -> None:
    done = manyhands("config", name)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1 and not done.stdout


def test_presets_are_listed_with_the_sizes_that_are_built() -> None:
    told = {one["name"]: one for one in json.loads(manyhands("presets", "--json").stdout)}
    assert list(told) == preset_names()
    for name in ("tiny", "shazeer-tiny", "switch-tiny", "deepseek-v3-tiny"):
        built = count_parameters(build(load_preset(name).model))
        assert told[name]["parameters"] == built[0]
    assert told["quickstart"]["max_seconds"] == 180
    shown = manyhands("presets").stdout
    assert all(f"\n{name} " in "\n" + shown for name in told) and "arXiv 2412.19437" in shown


def test_print_config_says_where_values_come_from_and_reads_back(tmp_path: Path) -> None:
    changes = ("train.max_steps=7", "data.sources=['a: b', c]", "model.attention={head_dim: 16}")
    done = manyhands("train", "--preset", "tiny", *changes, "--print-config")
    assert done.returncode == 0, done.stderr
    lines = {line.split(":")[0].strip(): line.partition(" # ")[2] for line in done.stdout.splitlines()}
    assert lines["max_steps"] == lines["sources"] == lines["head_dim"] == "command line"
    assert lines["num_experts"] == "preset tiny" and lines["ns_steps"] == "default"
    file = tmp_path / "run.yaml"
    file.write_text(done.stdout)
    assert load_run(file) == load_preset("tiny", changes)
    again = manyhands("train", "-c", str(file), "--print-config").stdout
    assert f"# {file}" in again and "# default" not in again


def test_print_config_leaves_out_the_model_of_a_start(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("start: some/model\n")
    done = manyhands("train", "-c", "run.yaml", "--print-config", cwd=tmp_path)
    assert "# model: that of start = some/model" in done.stdout and "\nmodel:" not in done.stdout


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("dry")
    text = write_text(folder)
    return folder, ["train", "--preset", "tiny", "--out", str(folder / "run"), "--data", str(text), *SMALL]


def test_dry_run_writes_nothing_and_says_what_the_run_then_does(dry: tuple[Path, list[str]]) -> None:
    folder, command = dry
    before = sorted(folder.rglob("*"))
    told = json.loads(manyhands(*command, "--dry-run", "--json").stdout)
    rows = json.loads(manyhands(*command, "--dry-run", "--json", "optim.name=adafactor").stdout)
    assert rows["memory_bytes"] > 8 * rows["parameters"]  # a mean for each row and column, beside weight and gradient
    shown = manyhands(*command, "--dry-run")
    assert sorted(folder.rglob("*")) == before
    assert shown.returncode == 0 and "nothing was written" in shown.stdout and "epochs   about" in shown.stdout
    summary = json.loads(manyhands(*command, "--json").stdout)
    start = json.loads((folder / "run" / "journal.jsonl").read_text().splitlines()[0])
    assert told["parameters"] == start["parameters"] and told["active_parameters"] == start["active_parameters"]
    assert told["steps"] == summary["steps"] and told["tokens"] == 8 * 4 * 32
    vocabulary = load_run(folder / "run" / "run.yaml").model.vocab_size
    tokens = TokenFile.open(folder / "run" / "data" / TRAIN_TOKENS, vocabulary).info.num_tokens
    assert abs(told["data"]["train_tokens"] / tokens - 1) < 0.1
    again = json.loads(manyhands(*command, "--dry-run", "--json").stdout)
    assert again["steps_done"] == 8 and again["data"] == {"train_tokens": tokens, "estimated": False}


MISTAKES = {
    "optim.lr=0": "optim.lr = 0: must be above 0",
    "model.vocab_size=100": "needs 257 tokens",
    "train.experts_implementation=groupedmm": "grouped_mm",
    "data.sources=[/no/such]": "/no/such",
}


@pytest.mark.parametrize("change", MISTAKES)
def test_dry_run_refuses_what_the_run_would(change: str, tmp_path: Path) -> None:
    done = manyhands("train", "--preset", "tiny", "--out", str(tmp_path / "run"), change, "--dry-run")
    assert done.returncode == 2 and MISTAKES[change] in done.stderr and not (tmp_path / "run").exists()


def test_print_config_and_json_do_not_go_together() -> None:
    done = manyhands("train", "--preset", "tiny", "--print-config", "--json")
    assert done.returncode == 2 and "leave --json" in done.stderr
