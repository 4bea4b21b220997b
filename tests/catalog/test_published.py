"""Published against computed, for the whole catalogue."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from manyhands.catalog import load, names
from manyhands.plan.published import Comparison, compare, compare_all

ROWS = compare_all()


@pytest.mark.parametrize("row", ROWS, ids=[f"{row.id}-{row.what}-{row.printed}" for row in ROWS])
def test_a_published_count_is_what_follows_or_the_difference_is_explained(row: Comparison) -> None:
    assert row.verdict != "off", row
    if row.verdict in ("within", "explained"):
        assert row.because, row


def test_every_system_with_an_architecture_is_compared_and_no_rumour_is() -> None:
    compared = {row.id for row in ROWS}
    assert {"mixtral-8x7b", "switch-c", "glam-64b-64e", "shazeer-moe-65536-h", "llama-3.1-405b"} <= compared
    assert not {"gpt-4", "claude", "composer-2", "jacobs-1991"} & compared
    assert len(ROWS) > 140


def test_the_verdicts() -> None:
    by_what = {(row.id, row.what, row.printed): row.verdict for row in ROWS}
    assert by_what["mixtral-8x7b", "total", "46.7B"] == "rounds to it"
    assert by_what["deepseek-v3", "active", "37B"] == "cut to it"
    assert by_what["deepseek-v3", "active_without_embedding", "36.7B"] == "within"
    assert by_what["qwen2.5-72b", "training_flops", "394G"] == "explained"


def test_a_difference_without_an_explanation_is_off() -> None:
    entry = load("kimi-k2")
    wrong = tuple(figure.model_copy(update={"explanation": None}) for figure in entry.figures)
    verdicts = {row.printed: row.verdict for row in compare(entry.model_copy(update={"figures": wrong}))}
    assert verdicts["1.04T"] == "off"


def test_the_computed_number_is_shown_as_the_published_one_is() -> None:
    row = ROWS[0]
    assert replace(row, printed="46.7B", computed=46_702_792_704).computed_as_printed() == "46.703B"
    assert replace(row, printed="60.8Gi", computed=65e9).computed_as_printed() == "60.536Gi"
    assert replace(row, printed="36684", computed=36864).computed_as_printed() == "36,864"


def test_the_documentation_says_what_is_computed() -> None:
    """The figures of docs/catalogue.md that are easiest to let go stale."""
    text = (Path(__file__).parents[2] / "docs" / "catalogue.md").read_text(encoding="utf-8")
    verdicts = Counter(row.verdict for row in ROWS)
    assert f"lists {len(names())} published systems" in text
    assert f"{len(ROWS)} figures of {len({row.id for row in ROWS})} systems" in text
    assert f"{verdicts['rounds to it']} round to what was printed, {verdicts['cut to it']} are cut to it" in text
    assert f"{verdicts['within']} lie within the tolerance" in text
    outside = {(row.id, row.printed) for row in ROWS if row.verdict == "explained"}
    assert outside == {("kimi-k2", "1.04T"), ("grok-1", "86B"), ("st-moe-32b", "32B"), ("qwen2.5-72b", "394G")}
