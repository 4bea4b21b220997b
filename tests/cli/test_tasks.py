"""`manyhands eval --tasks`: which flags go together, what is printed and written."""

import json
from pathlib import Path

import pytest

import manyhands as mh
from manyhands.cli import tasks
from manyhands.errors import UserError
from manyhands.text import Tokenizer

from ..small_runs import manyhands

RESULTS = {
    "results": {
        "arc": {"alias": "arc", "sample_len": 3, "acc,none": 0.5, "acc_stderr,none": 0.25, "f1,strict": 1},
        "wiki": {"alias": "wiki", "byte_perplexity,none": 2.5, "byte_perplexity_stderr,none": "N/A"},
        "nothing": {"alias": "nothing"},
    },
    "n-shot": {"arc": 5},
    "n-samples": {"arc": {"original": 10, "effective": 3}},
    "samples": {"arc": [{"resps": ["é"], "fn": len}]},
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tokenizer = Tokenizer.train(["the quick brown fox"], 300)
    model = mh.Decoder(mh.ModelConfig(vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=1))
    mh.init_weights(model, seed=0)
    mh.save(model, tmp_path / "model", tokenizer)
    return tmp_path / "model"


@pytest.fixture
def lm_eval(monkeypatch):
    """Installed, and with results."""
    asked = []

    class Lm:
        max_length = 64

    def run_tasks(lm, names, **how):
        asked.append((names, how))
        return RESULTS

    monkeypatch.setattr("manyhands.cli.tasks.find_spec", lambda name: object())
    monkeypatch.setattr("manyhands.generate.harness.language_model", lambda *given, **how: asked.append(how) or Lm())
    monkeypatch.setattr("manyhands.generate.harness.run_tasks", run_tasks)
    return asked


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "one of them"),
        (("--data", "x", "--tasks", "arc"), "not both"),
        (("--tasks", " , "), "one of them"),
        (("--data", "x", "--limit", "3"), "--limit says nothing with --data"),
        (("--data", "x", "--no-add-bos"), "--add-bos"),
        (("--tasks", "arc", "--max-batches", "3"), "--max-batches says nothing with --tasks"),
    ],
)
def test_flags_that_do_not_go_together(arguments, said) -> None:
    done = manyhands("eval", "nowhere", *arguments)
    assert done.returncode == UserError.exit_code and said in done.stderr and done.stderr.count("\n") == 1


def test_without_lm_eval_nothing_is_loaded(monkeypatch) -> None:
    monkeypatch.setattr("manyhands.cli.tasks.find_spec", lambda name: None)
    done = manyhands("eval", "nowhere", "--tasks", "arc")
    assert done.returncode == UserError.exit_code
    assert done.stderr == "manyhands: --tasks are lm-eval's, which is not installed: pip install 'manyhands[eval]'\n"


def test_results(lm_eval, model: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "results.json"
    arguments = (
        "--tasks",
        "arc, wiki",
        "--tasks",
        "nothing",
        "--limit",
        "3",
        "--batch-size",
        "2",
        "--output",
        str(output),
    )
    done = manyhands("eval", str(model), *arguments)
    assert done.returncode == 0, done.stderr
    assert lm_eval[0]["batch_size"] == 2 and lm_eval[0]["add_bos"] is None
    assert lm_eval[1][0] == ["arc", "wiki", "nothing"] and lm_eval[1][1]["limit"] == 3
    assert done.stdout.splitlines()[:3] == [
        "arc: acc 0.5000 ± 0.2500, f1 1.0000 (strict) (3 questions, 5-shot)",
        "wiki: byte_perplexity 2.5000",
        "nothing: no figures",
    ]
    written = json.loads(output.read_text())
    assert written["results"] == RESULTS["results"] and written["samples"]["arc"][0]["resps"] == ["é"]
    again = manyhands("eval", str(model), "--tasks", "arc", "--json", "--output", str(output))
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["max_length"] == 64 and "samples" not in json.loads(again.stdout)


def test_somebody_elses_file_stays(lm_eval, model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text("{}")
    done = manyhands("eval", str(model), "--tasks", "arc", "--output", str(tmp_path / "mine.json"))
    assert done.returncode == UserError.exit_code and "not made by this program" in done.stderr
    assert (tmp_path / "mine.json").read_text() == "{}" and not lm_eval


def test_what_is_not_there_is_said_first(lm_eval, model: Path, tmp_path: Path) -> None:
    done = manyhands("eval", str(model), "--tasks", "arc", "--task-dir", str(tmp_path / "none"))
    assert done.returncode == UserError.exit_code and "no such folder" in done.stderr
    done = manyhands("eval", str(model), "--tasks", "arc", "--apply-chat-template")
    assert done.returncode == UserError.exit_code and "no chat template" in done.stderr
    assert not lm_eval


def test_a_line_for_each_task() -> None:
    assert tasks.lines({"results": {}, "n-shot": None, "n-samples": None}) == []
