"""What a model will see of rows, and what it learns of them: in colour, or between brackets."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from manyhands.errors import DataError
from manyhands.text import Tokenizer
from manyhands.tune.show import show_data

from ..small_runs import small_run

CHAT = [{"role": "user", "content": "what?\x1b[2J"}, {"role": "assistant", "content": "that 😀"}]


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["### user assistant what that"] * 9, 300)


def shown(run_rows: list[object], tmp_path: Path, tokenizer: Tokenizer, number: int, terminal: bool) -> tuple[int, str]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in run_rows))
    console = Console(file=io.StringIO(), force_terminal=terminal, color_system="standard" if terminal else None,
                      soft_wrap=True, highlight=False)  # fmt: skip
    run = small_run(path, "rows.chat_template=plain")
    count = show_data(run, number, lambda: tokenizer, console)
    assert isinstance(console.file, io.StringIO)
    return count, console.file.getvalue()


def test_between_brackets(tmp_path: Path, tokenizer: Tokenizer) -> None:
    count, text = shown([{"messages": CHAT}] * 3, tmp_path, tokenizer, 2, terminal=False)
    assert count == 2 and text.count("⟦that 😀<|endoftext|>⟧") == 2 and "\x1b" not in text
    assert "### user\nwhat?[2J\n\n### assistant\n⟦" in text
    assert f"{tmp_path / 'rows.jsonl'}:1: " in text and "learnt" in text


def test_in_colour(tmp_path: Path, tokenizer: Tokenizer) -> None:
    _, text = shown([{"messages": CHAT}], tmp_path, tokenizer, 5, terminal=True)
    assert "\x1b[1;32mthat 😀<|endoftext|>" in text and "⟦" not in text and "\x1b[2J" not in text
    assert "\x1b[2m### user" in text


def test_cut_rows_say_so(tmp_path: Path, tokenizer: Tokenizer) -> None:
    long = [{"role": "user", "content": "what " * 50}, CHAT[1]]
    _, text = shown([{"messages": long}, {"messages": [CHAT[0], {**CHAT[1], "content": "that " * 60}]}], tmp_path,
                    tokenizer, 5, terminal=False)  # fmt: skip
    assert "left out: nothing to learn before the cut" in text and ", cut: 33 tokens" in text
    _, text = shown([{"text": "what that " * 30}], tmp_path, tokenizer, 5, terminal=False)
    assert "part 2 of" in text


def test_a_broken_row_is_an_error(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:2: .*no turn of the assistant"):
        shown([{"messages": CHAT}, {"messages": CHAT[:1]}], tmp_path, tokenizer, 5, terminal=False)
