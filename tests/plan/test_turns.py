"""Where one of two costs becomes the smaller, and what `plan --versus` and `plan` say of costs and prices."""

import json

from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from manyhands.cli.main import app
from manyhands.plan.turns import Stretch, stretches


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_one_turn_is_found_exactly(at: int, last: int) -> None:
    """a is smaller up to and with `at`: costs cross between `at` and the next number."""
    found = stretches(lambda x: x, lambda x: at + 0.5, last)
    assert found == ([Stretch(1, last, 0)] if last <= at else [Stretch(1, at, 0), Stretch(at + 1, last, 1)])


def test_two_turns_and_the_second_from_the_start() -> None:
    found = stretches(lambda x: (x - 5) * (x - 900), lambda x: 0.0, 1 << 16)
    assert found == [Stretch(1, 4, 1), Stretch(5, 900, 0), Stretch(901, 1 << 16, 1)]


def run(*arguments: str) -> str:
    return CliRunner().invoke(app, ["plan", *arguments]).stdout


def test_two_models_say_where_the_cheaper_one_changes() -> None:
    """The stretches of the sentence are those of the tables above it: K2.5 reads less at 1, more at 64."""
    told = " ".join(run("kimi-k2.5", "--versus", "qwen3-32b", "--context", "4k").split())
    assert "context: Kimi K2.5 up to batch 3, Qwen3-32B up to batch 671, Kimi K2.5 beyond" in told
    rows = json.loads(run("kimi-k2.5", "--versus", "qwen3-32b", "--json"))["sections"]
    ratios = {row["figure"]: row["ratio"]["value"] for row in rows["reading"]["table"]}
    assert ratios["batch 1, 4k"] < 1 < ratios["batch 64, 4k"]
    assert "DeepSeek-V3, at every batch up to 65,536" in " ".join(
        run("deepseek-v3", "--versus", "llama-3.1-405b").split()
    )


def test_prices_are_quoted_with_their_source() -> None:
    told = " ".join(run("deepseek-v3").split())
    assert "What is charged for it" in told and "0.27 USD" in told and "deepseek.com/quick_start/pricing" in told
    section = json.loads(run("deepseek-v3", "--json"))["sections"]["charged"]
    assert [figure["value"] for figure in section["figures"]] == [0.27, 1.10]
    assert "What is charged for it" not in run("mixtral-8x7b")
    refused = CliRunner().invoke(app, ["plan", "composer-2"])
    assert "0.50 USD/million tokens in, 2.50 USD/million tokens out (reported" in str(refused.exception)


def test_a_model_without_embedding_and_head_is_not_said_to_have_them() -> None:
    told = run("shazeer-moe-131072-h")
    assert "embedding and head: none described" in told and "without embedding" not in told
    assert "-" not in "".join(line for line in told.splitlines() if line.startswith("  routed experts"))
