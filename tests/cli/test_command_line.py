"""The verbs as a person uses them: help without torch, one line per mistake, exit codes."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from manyhands import kernels

from ..small_runs import SMALL, manyhands, write_text


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished small run."""
    folder = tmp_path_factory.mktemp("run")
    text = write_text(folder)
    done = manyhands("train", "--preset", "tiny", "--out", str(folder / "run"), "--data", str(text), "--json", *SMALL)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["steps"] == 8 and summary["valid_bits_per_byte"] > 0
    return folder / "run"


VERBS = (
    "train",
    "generate",
    "chat",
    "eval",
    "check",
    "convert",
    "quantize",
    "models",
    "plan",
    "doctor",
    "bench",
    "presets",
    "config",
)


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_needs_no_torch(verb: str) -> None:
    code = (
        "import sys; sys.argv = ['manyhands', *sys.argv[1:]]\n"
        "from manyhands.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    arguments = [verb, "--help"] if verb else ["--help"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def test_version() -> None:
    assert manyhands("--version").stdout.startswith("manyhands 0.")


def test_python_m_manyhands_is_the_same() -> None:
    command = [sys.executable, "-W", "error", "-m", "manyhands", "generate", "/no/such/place", "--prompt", "x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("manyhands: /no/such/place") and len(done.stderr.splitlines()) == 1


def test_the_run_is_complete(run_dir: Path) -> None:
    names = {path.name for path in run_dir.iterdir()}
    assert {"run.yaml", "journal.jsonl", "report.html", "checkpoints", "data"} <= names
    checkpoint = run_dir / "checkpoints" / "step-00000008"
    assert {path.name for path in checkpoint.iterdir()} >= {"config.json", "manifest.json", "model.safetensors"}


def test_generate_streams_the_prompt_and_more(run_dir: Path) -> None:
    arguments = ("generate", str(run_dir), "--prompt", "line 3", "--max-new-tokens", "6", "--seed", "1")
    done = manyhands(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("line 3") and len(done.stdout) > len("line 3\n")
    assert manyhands(*arguments).stdout == done.stdout
    told = json.loads(manyhands(*arguments, "--json").stdout)
    assert len(told["token_ids"]) == 6 and "line 3" + told["text"] + "\n" == done.stdout


def test_generate_takes_several_prompts(run_dir: Path) -> None:
    """Together, printed in their order, each as it is alone."""
    prompts, more = ("line 3", "a", "line"), ("--max-new-tokens", "6", "--temperature", "0")
    alone = [json.loads(manyhands("generate", str(run_dir), "--prompt", p, *more, "--json").stdout) for p in prompts]
    arguments = ("generate", str(run_dir), *(a for p in prompts for a in ("--prompt", p)), *more)
    assert json.loads(manyhands(*arguments, "--json").stdout) == alone
    assert manyhands(*arguments).stdout == "\n".join(f"{one['prompt']}{one['text']}\n" for one in alone)
    shown = manyhands(*arguments, "--show-routing").stdout.split("\n\n")
    assert [len(part.strip().splitlines()) for part in shown] == [len(one["token_ids"]) for one in alone]


def test_generate_shows_the_experts(run_dir: Path) -> None:
    done = manyhands("generate", str(run_dir), "--prompt", "line", "--max-new-tokens", "3", "--show-routing")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and all("L1" in line and "·" in line for line in lines)


def test_generate_reads_standard_input(run_dir: Path) -> None:
    done = manyhands("generate", str(run_dir), "--max-new-tokens", "2", stdin="line 5")
    assert done.returncode == 0 and done.stdout.startswith("line 5")
    both = manyhands(
        "generate", str(run_dir), "--prompt", "a", "--prompt", "-", "--max-new-tokens", "2", "--json", stdin="line 5\n"
    )
    assert [one["prompt"] for one in json.loads(both.stdout)] == ["a", "line 5"]  # the last line break is the shell's
    twice = manyhands("generate", str(run_dir), "--prompt", "-", "--prompt", "-", stdin="x")
    assert twice.returncode == 2 and "read once" in twice.stderr


def test_eval(run_dir: Path, tmp_path: Path) -> None:
    done = manyhands("eval", str(run_dir), "--data", str(write_text(tmp_path, 50)), "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["bits_per_byte"] > 0 and abs(sum(figures["load"]["1"]["load"]) - 1) < 1e-6


def test_eval_of_a_run_takes_its_own_validation_text(run_dir: Path) -> None:
    figures = json.loads(manyhands("eval", str(run_dir), "--json").stdout)
    summary = json.loads(manyhands("train", "--resume", str(run_dir), "--json").stdout)
    assert figures["bits_per_byte"] == pytest.approx(summary["valid_bits_per_byte"], rel=1e-5)
    assert "the run's own validation text" in manyhands("eval", str(run_dir)).stdout
    done = manyhands("eval", str(run_dir / "checkpoints" / "step-00000008"))
    assert done.returncode == 2 and "--data TEXT" in done.stderr


def test_training_again_says_it_is_finished_and_changes_nothing(run_dir: Path, tmp_path: Path) -> None:
    before = (run_dir / "checkpoints" / "step-00000008" / "model.safetensors").read_bytes()
    done = manyhands("train", "--resume", str(run_dir))
    assert done.returncode == 0, done.stderr
    assert "finished" in done.stdout
    assert (run_dir / "checkpoints" / "step-00000008" / "model.safetensors").read_bytes() == before


MISTAKES = {
    "unknown preset": (["train", "--preset", "quikstart"], "quickstart"),
    "nothing to train": (["train"], "--preset"),
    "unknown field": (["train", "--preset", "tiny", "model.hiden_size=3"], "hidden_size"),
    "unknown option": (["train", "--presett", "tiny"], "--preset"),
    "k > E": (["train", "--preset", "tiny", "model.moe.router.num_experts_per_tok=9"], "num_experts = 8"),
    "groups that do not divide": (["train", "--preset", "tiny", "model.moe.router.n_group=3"], "n_group = 3"),
    "no such data": (["train", "--preset", "tiny", "--data", "/no/such/file.txt", "--out", "OUT"], "/no/such/file.txt"),
    "empty data": (["train", "--preset", "tiny", "--data", "EMPTY", "--out", "OUT"], "EMPTY"),
    "undecodable data": (["train", "--preset", "tiny", "--data", "BINARY", "--out", "OUT"], "BINARY"),
    "vocabulary too small": (
        ["train", "--preset", "tiny", "model.vocab_size=100", "--data", "TEXT", "--out", "OUT"],
        "257",
    ),
    "no such backend": (
        ["train", "--preset", "tiny", "train.experts_implementation=groupedmm", "--data", "TEXT", "--out", "OUT"],
        "grouped_mm",
    ),
    "not a checkpoint": (["generate", "FOLDER", "--prompt", "x"], "FOLDER"),
    "not a checkpoint, eval": (["eval", "FOLDER", "--data", "TEXT"], "FOLDER"),
    "no such thing to check": (["check", "nothing"], "preset"),
    "bad sampling": (["generate", "FOLDER", "--prompt", "x", "--top-p", "7"], "top_p"),
    "not YAML": (["train", "-c", "BROKEN"], "BROKEN"),
    "resume of nothing": (["train", "--resume", "FOLDER"], "run.yaml"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(mistake: str, tmp_path: Path) -> None:
    arguments, said = MISTAKES[mistake]
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "EMPTY" / "a.txt").write_text("")
    (tmp_path / "BINARY").mkdir()
    (tmp_path / "BINARY" / "a.txt").write_bytes(b"\xff\xfe\x00" * 100)
    (tmp_path / "FOLDER").mkdir()
    (tmp_path / "BROKEN").write_text("model: [1, 2\n  x: {")
    write_text(tmp_path).rename(tmp_path / "TEXT.txt")
    arguments = [argument + ".txt" if argument == "TEXT" else argument for argument in arguments]
    done = manyhands(*arguments, cwd=tmp_path)
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith("manyhands: ")


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = manyhands("generate", str(tmp_path), "--prompt", "x", "--debug")
    assert done.returncode == 2 and "Traceback" in done.stderr


def test_another_run_in_the_directory_is_refused(run_dir: Path, tmp_path: Path) -> None:
    done = manyhands("train", "--preset", "tiny", "--out", str(run_dir))
    assert done.returncode == 2 and "another run" in done.stderr


def test_a_damaged_checkpoint_is_refused(run_dir: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(run_dir / "checkpoints" / "step-00000008", copy)
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-5] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    done = manyhands("generate", str(copy), "--prompt", "x")
    assert done.returncode == 2 and "model.safetensors" in done.stderr and "Traceback" not in done.stderr


def test_check_is_green_and_machine_readable() -> None:
    done = manyhands("check", "tiny", "--no-routers", "--backend", "grouped_mm", "--dtype", "float32", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ok"] is True


def test_check_is_red_when_a_backend_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    real = kernels.BACKENDS["grouped_mm"]
    wrong = replace(real, run=lambda x, *rest: 1.01 * real.run(x, *rest))
    monkeypatch.setitem(kernels.BACKENDS, "grouped_mm", wrong)
    done = manyhands("check", "tiny", "--no-routers", "--backend", "grouped_mm", "--dtype", "float32")
    assert done.returncode == 4
    assert "comparisons failed; first:" in done.stderr and len(done.stderr.strip().splitlines()) == 1
