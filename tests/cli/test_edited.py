"""`generate --without-expert`, `--replay`, `inspect --ablate`, as a user runs them."""

import json
from pathlib import Path

import pytest

import manyhands as mh

from ..small_runs import SMALL, manyhands, write_text


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    text = write_text(folder)
    done = manyhands("train", "--preset", "tiny", "--out", str(folder / "run"), "--data", str(text), "--json", *SMALL)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def record(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("replay") / "trace"
    arguments = ("--prompt", "line 3", "--max-new-tokens", "6", "--temperature", "0", "--trace", str(path))
    done = manyhands("generate", str(run_dir), *arguments)
    assert done.returncode == 0, done.stderr
    return path


def layer_of(run_dir: Path) -> int:
    return min(mh.load(run_dir)[0].sparse_layers())


def test_without_an_expert_both_texts_are_shown(run_dir: Path) -> None:
    n = layer_of(run_dir)
    arguments = ("generate", str(run_dir), "--prompt", "line 3", "--max-new-tokens", "6", "--temperature", "0")
    plain = json.loads(manyhands(*arguments, "--json").stdout)
    done = manyhands(*arguments, "--without-expert", f"{n}.0", "--without-expert", f"{n}.1")
    assert done.returncode == 0, done.stderr
    assert f"[as it is]\nline 3{plain['text']}\n" in done.stdout
    assert f"[without {n}.0, {n}.1]\nline 3" in done.stdout and "nats per token" in done.stdout
    told = json.loads(manyhands(*arguments, "--without-expert", f"{n}.0", "--json").stdout)
    assert told["original"]["token_ids"] == plain["token_ids"] and told["without_experts"] == {str(n): [0]}
    assert told["edited"]["loss"] != told["original"]["loss"] > 0 and told["loss_tokens"] >= 6


def test_a_replayed_trace_says_the_same(run_dir: Path, record: Path) -> None:
    done = manyhands("generate", str(run_dir), "--replay", str(record), "--max-new-tokens", "6", "--temperature", "0")
    assert done.returncode == 0, done.stderr
    assert "[replayed]\n" in done.stdout and "(+0.0000 nats per token" in done.stdout
    assert "the same answer" in done.stdout


@pytest.mark.parametrize(
    "flags, says",
    [
        (("--prompt", "x", "--without-expert", "17"), "--without-expert 17: give a layer and one of its experts"),
        (("--prompt", "x", "--without-expert", "99.0"), "there is no router in layer 99"),
        (("--prompt", "x", "--without-expert", "LAYER.999"), "there is no expert 999"),
        (("--prompt", "x", "--replay", "/no/such"), "--replay brings its own texts: leave --prompt out"),
        (("--replay", "/no/such"), "/no/such"),
        (("--prompt", "x", "--without-expert", "LAYER.0", "--show-routing"), "--show-routing goes with one answer"),
    ],
)
def test_a_mistake_is_one_line(run_dir: Path, flags: tuple[str, ...], says: str) -> None:
    n = layer_of(run_dir)
    done = manyhands("generate", str(run_dir), "-q", *(f.replace("LAYER", str(n)) for f in flags))
    assert done.returncode > 0 and says in done.stderr and "Traceback" not in done.stderr
    assert not done.stdout and len(done.stderr.strip().splitlines()) == 1


def test_ablate_ranks_every_expert(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("".join(f"line {i}: some words and more of them\n" for i in range(60)))
    arguments = ("inspect", str(run_dir), "--data", str(tmp_path / "text.txt"), "--ablate", "--sequence-length", "16")
    told = json.loads(manyhands(*arguments, "--max-tokens", "200", "--json").stdout)
    rises = [a["increase"] for a in told["experts"]]
    model = mh.load(run_dir)[0]
    assert rises == sorted(rises, reverse=True) and len(rises) == sum(
        mlp.router.config.num_experts for mlp in model.sparse_layers().values()
    )
    done = manyhands(*arguments, "--max-tokens", "200")
    assert done.returncode == 0 and "rise of the loss" in done.stdout, done.stderr
    wrong = manyhands("inspect", str(run_dir), "--ablate")
    assert wrong.returncode > 0 and "give a model, and --data TEXT" in wrong.stderr
