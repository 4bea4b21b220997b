"""Speeds that others published: never above the bound, in files of the size that is computed; the page shows them."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from manyhands.plan.machine import machine_named
from manyhands.plan.published_speeds import Compared, all_compared, compared, experts_in_host, published_speeds

from ..small_runs import manyhands

ROOT = Path(__file__).parents[2]


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("speed_table", ROOT / "scripts" / "speed_table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def named(each: Compared) -> str:
    return f"{each.speed.model} on {each.speed.machine}, batch {each.speed.batch} at {each.speed.context}"


def test_no_measured_speed_exceeds_the_bound() -> None:
    assert len({each.speed.url for each in all_compared()}) >= 10 and len(all_compared()) >= 50
    assert [named(each) for each in all_compared() if each.share > 1] == []


def test_one_sequence_or_a_prompt_does_not_exceed_uniform_routing_either() -> None:
    """A single token touches K experts whatever its routing; a prompt computes the same arithmetic."""
    alone = [each for each in all_compared() if each.speed.batch == 1 or each.speed.work == "prefill"]
    assert [named(each) for each in alone if each.of_uniform > 1] == []
    for each in alone:
        if each.speed.work == "decode":
            assert each.bound.least_seconds == pytest.approx(each.bound.seconds, rel=1e-12)


def test_a_wrong_figure_of_a_machine_would_be_seen() -> None:
    """With half of its bandwidth, a published speed of every kind of machine lies above the bound."""
    over = set()
    for each in all_compared():
        halved = replace(each.bound, read_seconds=2 * each.bound.read_seconds)
        if each.speed.tokens_per_second > halved.most_per_second:
            over.add(each.machine.kind)
    assert over >= {"gpu", "unified"}


def test_files_are_as_long_as_their_sources_say() -> None:
    """So the formats are those that were measured: within 1 %."""
    told = [each for each in all_compared() if each.speed.gib is not None]
    assert len(told) >= 9
    for each in told:
        assert each.speed.gib is not None
        assert each.file_bytes / 2**30 == pytest.approx(each.speed.gib, rel=0.01), named(each)


def test_a_batch_whose_tokens_agree_reads_the_experts_of_one() -> None:
    speed = next(each for each in published_speeds() if each.model == "qwen3-30b-a3b" and each.batch == 16)
    step = compared(speed).bound.step
    one = compared(speed.model_copy(update={"batch": 1})).bound.step
    assert step.distinct > 4 * one.distinct == 4 * 8
    assert step.least == pytest.approx(step.fixed + step.cache + one.experts, rel=1e-12) and step.least < step.total


def test_experts_in_host_memory_are_read_by_the_host() -> None:
    """V3's experts of a token at 307.2 GB/s take longer than all else at 1.008 TB/s."""
    speed = next(each for each in published_speeds() if each.host == "xeon-sapphire-rapids")
    bound = compared(speed).bound
    assert bound.seconds == pytest.approx(bound.step.experts / 307.2e9, rel=1e-12)
    fast = experts_in_host(bound, machine_named("rtx-4090"), machine_named("h100x8"))
    assert fast.read_seconds == pytest.approx((bound.step.total - bound.step.experts) / 1.008e12, rel=1e-12)


def test_the_page_has_the_table_as_it_is() -> None:
    found = script()
    assert found.page() == found.PAGE.read_text(encoding="utf-8"), "python scripts/speed_table.py"


def test_plan_quotes_what_was_measured_on_that_machine() -> None:
    printed = " ".join(manyhands("plan", "qwen3-30b-a3b", "--machine", "m2-ultra").stdout.split())
    assert "measured by others: batch 1 at 64 positions in q8_0 76.31 tok/s (llama.cpp, 2025-08-27)" in printed
    changed = manyhands("plan", "qwen3-30b-a3b", "num_experts=64", "--machine", "m2-ultra").stdout
    assert "measured by others" not in changed
