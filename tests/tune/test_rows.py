"""Tuning on rows from the command line; a checkpoint of what was tuned keeps the template of its rows."""

import json
from pathlib import Path

import pytest

from manyhands.checkpoint.model import load
from manyhands.checkpoint.runs import RunDirectory
from manyhands.text import Tokenizer

from ..small_runs import manyhands
from .small import TUNE

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|endoftext|>"
    "{% endgeneration %}{% else %}{{ m.content }}={% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    (folder / "template.jinja").write_text(TEMPLATE)
    with (folder / "rows.jsonl").open("w") as file:
        for i in range(80):
            messages = [{"role": "user", "content": str(i % 40)}, {"role": "assistant", "content": "xyz"[i % 3]}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return folder


@pytest.mark.parametrize("method", ["full", "esft"])
def test_the_template_goes_along(base: Path, rows: Path, tmp_path: Path, method: str) -> None:
    sample = ["-s", "tune.sample_tokens=200"] if method == "esft" else []
    arguments = ["--method", method, *TUNE, *sample, "-s", f"rows.chat_template={rows / 'template.jinja'}", "--json"]
    said = manyhands("tune", str(base), "--data", str(rows / "rows.jsonl"), "--out", str(tmp_path / "run"), *arguments)
    assert said.returncode == 0, said.stderr
    summary = json.loads(said.stdout)
    assert summary["valid_loss"] < summary["before"]["valid_loss"]
    newest = RunDirectory(tmp_path / "run").newest_valid()
    assert newest is not None and (newest[1] / "tuned.json").exists() is (method == "esft")
    model, tokenizer = load(tmp_path / "run")
    assert tokenizer.chat_template == TEMPLATE and model.tokenizer is tokenizer
    chat = manyhands("generate", str(tmp_path / "run"), "--prompt", "7=", "--max-new-tokens", "3")
    assert chat.returncode == 0, chat.stderr
    merged = manyhands("convert", str(tmp_path / "run"), str(tmp_path / "whole"))
    assert merged.returncode == 0, merged.stderr
    assert Tokenizer.from_directory(tmp_path / "whole").chat_template == TEMPLATE


def test_a_broken_row_ends_before_anything_is_written(base: Path, rows: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
    template = f"rows.chat_template={rows / 'template.jinja'}"
    said = manyhands("tune", str(base), "--data", str(path), "--out", str(tmp_path / "run"), "-s", template)
    assert said.returncode == 2 and len(said.stderr.splitlines()) == 1
    assert said.stderr.endswith(f"{path}:1: there is no turn of the assistant in it to learn\n")
    assert not (tmp_path / "run" / "checkpoints").exists()
