"""Guessing ahead: the formula by hand, against published speeds, and what the command says and refuses."""

import json
from dataclasses import replace

import pytest

from manyhands.catalog import load
from manyhands.errors import ConfigError
from manyhands.plan.estimate import DECODE, Kind, law_for
from manyhands.plan.machine import machine_named
from manyhands.plan.published_speeds import all_compared
from manyhands.plan.roof import decode_bound
from manyhands.plan.speculation import Guessing, guessing, of_chance, read_accepted
from manyhands.plan.storage import BF16, storage_named
from manyhands.plan.subject import of_catalogue
from manyhands.plan.traffic import decode_bytes, expert_bytes

from ..small_runs import manyhands

PUBLISHED = (
    (1, 1.92, 198, 0.04),
    (2, 2.58, 250, 0.07),
    (3, 2.82, 253, 0.11),
    (4, 2.99, 245, 0.17),
    (5, 3.01, 239, 0.17),
)
"""Guesses, tokens a step, tokens/s and the error that docs/planning.md states (DeepSeek-R1, its source 14)."""


def test_published_gains() -> None:
    """NVIDIA's, on eight B200; without guesses 111 tokens/s. What is estimated never saw that source's speeds."""
    [base] = [each for each in all_compared() if each.speed.machine == "b200x8"]
    subject, group = of_catalogue(load("deepseek-r1")), f"{base.speed.url} {base.speed.engine}"
    assert subject.sizes is not None and base.speed.tokens_per_second == 111
    law, _ = law_for(Kind(DECODE, several=True), without=group)
    storage = replace(storage_named("nvfp4", subject.native), parts=(("attention", 16.0),))

    def speed(drafts: int, accepted: float) -> tuple[float, float]:
        step = guessing(
            *(base.machine, subject.sizes, subject.counts, storage, drafts, accepted), context=2048, module=BF16
        )
        return step.speed(step.expected_seconds(law)), step.speed(step.seconds)

    usual, bound = speed(0, 1.0)
    assert bound == pytest.approx(base.bound.tokens_per_second, rel=1e-9)
    for drafts, accepted, measured, error in PUBLISHED:
        found, best = speed(drafts, accepted)
        assert best > measured and 0 < (found / usual) / (measured / 111) - 1 <= error, (drafts, found)


def mixtral(drafts: int, accepted: float, batch: int, module: bool) -> Guessing:
    subject, machine = of_catalogue(load("mixtral-8x7b")), machine_named("h200")
    assert subject.sizes is not None
    return guessing(
        *(machine, subject.sizes, subject.counts, BF16, drafts, accepted),
        batch=batch,
        context=4096,
        module=BF16 if module else None,
    )


def test_by_hand() -> None:
    """The pass reads the experts of B·(1 + d) tokens and B caches; a draft is a block, a projection and the head."""
    subject = of_catalogue(load("mixtral-8x7b"))
    sizes, counts = subject.sizes, subject.counts
    assert sizes is not None
    found = mixtral(2, 2.0, 4, module=True)
    four, twelve = (decode_bytes(sizes, counts, BF16, batch=n, context=4096) for n in (4, 12))
    assert found.check.step.experts == twelve.experts and found.check.step.cache == four.cache < twelve.cache
    assert found.sequences == 4 and found.draft is not None
    D, parts = 4096, counts.by_component
    others = sum(n for name, n in parts.items() if name not in ("embedding", "head", "routed experts"))
    block = 2 * (others / 32 + parts["head"] + 2 * D * D) + 4 * D * 2
    experts = 8 * (1 - (6 / 8) ** 4) * expert_bytes(sizes, counts, BF16)
    assert found.draft.step.total == pytest.approx(block + experts + four.cache / 32, rel=1e-9)
    assert found.seconds == pytest.approx(found.check.seconds + 2 * found.draft.seconds)
    assert found.speed(found.seconds) == pytest.approx(8 / found.seconds)
    assert mixtral(2, 2.0, 4, module=False).seconds == found.check.seconds


def test_no_guess_is_plain_decoding() -> None:
    subject, machine = of_catalogue(load("mixtral-8x7b")), machine_named("h200")
    assert subject.sizes is not None
    plain = decode_bound(machine, subject.sizes, subject.counts, BF16, batch=3, context=4096)
    assert mixtral(0, 1.0, 3, module=True).check == plain


def test_acceptance() -> None:
    assert of_chance(0.85, 1) == pytest.approx(1.85) and of_chance(1.0, 3) == 4
    assert read_accepted("50%", 3) == pytest.approx(1 + 0.5 + 0.25 + 0.125) and read_accepted("2.82", 3) == 2.82
    for text in ("5", "0.5", "nan", "inf", "120%", "0%", "-3%", "many", ""):
        with pytest.raises(ConfigError, match=f"--accepted {text}: expected the tokens a step gives, 1 to 4"):
            read_accepted(text, 3)


def test_the_command() -> None:
    asked = ["plan", "mixtral-8x7b", "--machine", "h200", "--context", "4k", "--format", "int8"]
    done = manyhands(*asked, "--speculate", "2", "--accepted", "2", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)["sections"]
    rows = {row["step"]: row for row in told["speculation"]["table"]}
    usual = {row["step"]: row for row in told["expected"]["table"]}
    one = rows["batch 1, looked up"]
    plain = usual["decode, batch 1"]["estimate"]["value"]
    assert one["gain"]["value"] == pytest.approx(one["expected"]["value"] / plain, rel=1e-9)
    assert one["gain"]["value"] == pytest.approx(2 / one["pays_from"]["value"], rel=1e-9)
    assert rows["batch 1, a block drafts"]["expected"]["value"] < one["expected"]["value"]
    for arguments, said in (
        (["--speculate", "2"], "go together"),
        (["--speculate", "2", "--accepted", "4"], "1 to 3 with --speculate 2"),
        (["--speculate", "2", "--accepted", "2", "--versus", "qwen3-32b"], "is about one model"),
    ):
        done = manyhands(*asked, *arguments)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done
