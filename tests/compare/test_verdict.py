"""The verdict on made-up journals: each limit from both sides. Real runs: test_recorded.py."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from manyhands.compare import limits
from manyhands.compare.verdict import Verdict, judge
from manyhands.config.load import load_preset

RUN = load_preset("tiny", ["train.max_steps=400"])  # V 512, 8 experts, 2 per token, in layer 1
Record = dict[str, Any]
FAIR = [1 / 8] * 8


def settled(step: int) -> float:
    """A loss that falls and settles."""
    return 2.5 + 3.7 * math.exp(-step / 60)


def journal(
    n: int = 400,
    loss: Callable[[int], float] = settled,
    load: Callable[[int], list[float]] = lambda step: FAIR,
    evals: dict[int, float] | None = None,
    end: str | None = "finished",
    noise: float = 0.05,
    data: Record | None = None,
    **more: Any,
) -> list[Record]:
    """A run of n steps of 512 tokens."""
    rng = np.random.default_rng(0)
    start: Record = {"kind": "start", "step": 0, "num_experts": 8, "num_experts_per_tok": 2, "sparse_layers": [1]}
    out = [start | {"data": data or {"unigram": 5.0, "train_tokens": 100_000}}]
    for step in range(1, n + 1):
        record = {"kind": "step", "step": step, "loss": loss(step) + noise * rng.normal(), "skipped": False}
        record |= {"tokens": 512 * step, "moe": {"1": {"load": load(step)}}, **more}
        out.append({name: value(step) if callable(value) else value for name, value in record.items()})
    for step, valid in (evals or {n: loss(n)}).items():
        out.append({"kind": "eval", "step": step, "valid_loss": valid})
    if end is not None:
        out.append({"kind": "end", "step": n, "reason": end, "max_steps": 400})
    return out


def kinds(verdict: Verdict) -> set[tuple[str, bool]]:
    return {(finding.kind, finding.fault) for finding in verdict.findings}


def told(**how: Any) -> set[tuple[str, bool]]:
    return kinds(judge(journal(**how), RUN))


def test_a_good_run_is_worth_keeping_and_that_is_all() -> None:
    verdict = judge(journal(), RUN)
    assert verdict.findings == () and verdict.outcome == "worth keeping"
    assert verdict.lines() == ["verdict: worth keeping"] and verdict.exit_code(strict=True) == 0


def test_a_remark_counts_only_when_strict() -> None:
    verdict = judge(journal(data_wait=0.6), RUN)
    assert kinds(verdict) == {("data_wait", False)} and verdict.outcome == "worth keeping"
    assert (verdict.exit_code(), verdict.exit_code(strict=True)) == (0, 4)
    assert told(data_wait=0.4) == set()


def test_a_short_run_is_not_judged() -> None:
    bad: dict[str, Any] = {"loss": lambda step: 9.0, "load": lambda step: [0.5, 0.5, *[0.0] * 6]}
    verdict = judge(journal(n=limits.MIN_STEPS - 1, **bad), RUN)
    assert kinds(verdict) == {("short", False)} and verdict.outcome == "too short to judge"
    assert verdict.exit_code() == 0
    assert ("chance", True) in told(n=limits.MIN_STEPS, **bad)
    assert judge([], RUN).outcome == "not worth keeping" and judge([], None).outcome == "not worth keeping"


def test_what_did_not_end() -> None:
    for end, kind in ((None, "unfinished"), ("SIGTERM", "unfinished"), ("halted: step 7: the loss is NaN", "halted")):
        verdict = judge(journal(n=120, end=end, evals={100: 3.0}), RUN)
        assert (kind, True) in kinds(verdict), end
        assert "step 120 of 400" in verdict.lines()[1]
    killed_again = [record for record in journal(n=200) if record["kind"] != "end"]
    earlier = {"kind": "end", "step": 90, "reason": "finished", "max_steps": 90}
    assert ("unfinished", True) in kinds(judge([*killed_again, earlier], RUN))


def test_divergence_is_a_real_rise() -> None:
    def up(by: float) -> Callable[[int], float]:
        return lambda step: settled(step) + (by if step > 350 else 0)

    assert told(loss=up(0.5)) == {("diverged", True)}
    assert told(loss=up(0.07)) == set()
    assert told(loss=up(0.2), noise=1.5) == set()  # within the noise
    assert told(loss=lambda step: 0.001 * settled(step) + (0.002 if step > 350 else 0), noise=0.0) == set()


def test_a_rise_that_was_made_good_is_a_remark() -> None:
    def hump(height: float) -> Callable[[int], float]:
        return lambda step: settled(step) + (height if 150 < step < 220 else 0)

    assert told(loss=hump(1.0)) == {("rate_high", False)}
    assert told(loss=hump(0.1)) == set()


def test_chance_and_the_unigram() -> None:
    assert told(loss=lambda step: 6.3) == {("chance", True)}  # ln 512 is 6.238
    slow = judge(journal(loss=lambda step: 6.2 - 0.003 * step, noise=0.01), RUN)
    assert kinds(slow) == {("rate_low", True)} and "raise optim.lr (0.01)" in slow.lines()[1]
    restless = judge(journal(loss=lambda step: 5.2 + 0.3 * (step // 40 % 2), evals={400: 4.9}, noise=0.01), RUN)
    assert ("rate_high", True) in kinds(restless) or ("diverged", True) in kinds(restless)
    learnt = judge(journal(loss=lambda step: 6.2 - 0.004 * step, noise=0.01), RUN)  # 4.6 at the end
    assert ("rate_low", True) not in kinds(learnt)
    no_unigram = journal(loss=lambda step: 6.2 - 0.0005 * step, noise=0.01, data={"train_tokens": 100_000})
    assert kinds(judge(no_unigram, RUN)) == {("rate_low", True)}


def test_overfitting_needs_a_validation_that_was_better() -> None:
    rising = {100: 3.2, 200: 2.9, 300: 2.95, 400: 3.1}
    verdict = judge(journal(evals=rising), RUN)
    assert kinds(verdict) == {("overfit", True)}
    assert "best at step 200 of 400 (loss 2.900) and is 6.9% worse" in verdict.lines()[1]
    assert "2.0 epochs" in verdict.lines()[1]
    assert "was not kept" in verdict.lines()[1] and "train.early_stop=3" in verdict.lines()[1]
    saved = {"kind": "checkpoint", "step": 200, "path": "checkpoints/step-00000200"}
    assert "take RUN/best, the model of step 200" in judge([*journal(evals=rising), saved], RUN).lines()[1]
    assert told(evals={100: 3.2, 200: 2.9, 400: 2.93}) == {("overfit", False)}
    assert told(evals={100: 3.2, 200: 2.9, 400: 2.91}) == set()
    stopped = {"kind": "early_stop", "step": 400, "best_step": 200}
    assert kinds(judge([*journal(evals=rising), stopped], RUN)) == {("overfit", False)}


def test_a_gap_after_many_epochs() -> None:
    few, many = ({"unigram": 5.0, "train_tokens": tokens} for tokens in (100_000, 10_000))
    assert told(evals={400: 3.6}, data=many) == {("overfit", True)}
    assert told(evals={400: 3.6}, data=few) == set()
    assert told(evals={400: 2.9}, data=many) == set()


def test_still_falling() -> None:
    assert told(loss=lambda step: 6.2 - 0.008 * step) == {("still_falling", False)}
    assert told(loss=lambda step: 6.2 - 0.008 * step, end="SIGTERM") == {("unfinished", True)}


def test_collapse_names_the_experts_and_the_step() -> None:
    def from_40(step: int) -> list[float]:
        return FAIR if step <= 40 else [0.0, 0.0, 0.0, 0.5, 0.0, 0.5, 0.0, 0.0]

    verdict = judge(journal(load=from_40), RUN)
    assert kinds(verdict) == {("collapse", True)}
    said = re.search(r"layer 1 sends nearly every token to experts 3, 5 of 8 since step (\d+)", verdict.lines()[1])
    assert said and 40 <= int(said[1]) <= 46 and "balance.bias_update_rate (0.01)" in verdict.lines()[1]


def test_collapse_onto_others_from_step_to_step() -> None:
    """No expert is dead, and on average all are equally busy."""

    def by_turns(step: int) -> list[float]:
        return [0.5 if expert // 2 == step % 4 else 0.0 for expert in range(8)]

    verdict = judge(journal(load=by_turns), RUN)
    assert kinds(verdict) == {("collapse", True)} and "others from step to step" in verdict.lines()[1]


def test_uneven_and_dead() -> None:
    assert told(load=lambda step: [0.35, 0.35, *[0.05] * 6]) == {("uneven", False)}
    assert told(load=lambda step: [0.2, 0.2, *[0.1] * 6]) == set()
    one = judge(journal(load=lambda step: [0.0, *[1 / 7] * 7]), RUN)
    assert kinds(one) == {("dead", True)} and "no token chose expert 0 (1 of 8)" in one.lines()[1]
    rare = [0.0, *[1 / 63] * 63]
    run = load_preset("tiny", ["model.moe.router.num_experts=64"])
    assert kinds(judge(journal(load=lambda step: rare), run)) == {("dead", False)}
    few_tokens = [record | ({"tokens": 8 * record["step"]} if record["kind"] == "step" else {}) for record in journal()]
    assert ("dead", True) not in kinds(judge(few_tokens, run))


def test_experts_that_say_nothing_or_the_same() -> None:
    """Whatever their load: it is even here."""
    of: Record = {"cost": [0.01] * 8, "size": [1.0] * 8, "twin": [4] * 8, "distance": [0.8] * 8}
    plain = {"kind": "worth", "step": 400, "layers": {"1": of}}
    assert kinds(judge([*journal(), plain], RUN)) == set()
    one = plain | {"layers": {"1": of | {"size": [1.0, 0.0, *[1.0] * 6]}}}
    verdict = judge([*journal(), one], RUN)
    assert kinds(verdict) == {("interchangeable", False)} and "expert 1 of 8 says nothing" in verdict.lines()[1]
    twins = plain | {"layers": {"1": of | {"distance": [0.0, 0.8, 0.8, 0.8, 0.0, *[0.8] * 3]}}}
    verdict = judge([*journal(), twins], RUN)
    assert kinds(verdict) == {("interchangeable", True)}
    assert "experts 0, 4 of 8 say what another says (expert 0 what 4 says)" in verdict.lines()[1]
    tuned = RUN.model_copy(update={"start": "elsewhere"})
    assert ("interchangeable", True) not in kinds(judge([*journal(), twins], tuned))
    unseen = plain | {"layers": {"1": {"cost": [None] * 8, "size": [None] * 8, "distance": [None] * 8}}}
    assert kinds(judge([*journal(), unseen], RUN)) == set()


def test_a_frozen_router_is_not_blamed_on_the_run() -> None:
    collapsed = journal(load=lambda step: [0.5, 0.5, *[0.0] * 6])
    frozen = load_preset("tiny", ["trainable=['!layers.*.mlp.router.*']"])
    verdict = judge(collapsed, frozen)
    assert kinds(verdict) == {("collapse", False)} and "the router is frozen" in verdict.lines()[1]
    trained = load_preset("tiny", ["trainable=['*.router.*', 'layers.1.*']"])
    assert kinds(judge(collapsed, trained)) == {("collapse", True)}


def test_hash_and_dense_do_not_collapse() -> None:
    table = {"select": "hash", "num_experts": 8, "num_experts_per_tok": 1}
    run = RUN.model_copy(update={"model": load_preset("tiny", [f"model.moe.router={table}"]).model})
    records = journal(load=lambda step: [0.9, *[0.1 / 7] * 7])
    records[0]["num_experts_per_tok"] = 1
    assert kinds(judge(records, run)) == set()
    dense = [record | {"moe": {}} if record["kind"] == "step" else record for record in journal()]
    dense[0] |= {"num_experts_per_tok": None}
    assert kinds(judge(dense, None)) == set()


def test_skipped_updates() -> None:
    assert told(skipped=lambda step: step % 40 == 0) == {("skipped", False)}
    assert told(skipped=lambda step: step % 4 == 0) == {("skipped", True)}
    assert told(skipped=lambda step: step == 7) == set()


def test_every_other_logged_step_will_do() -> None:
    sparse = [r for r in journal(load=lambda step: [0.5, 0.5, *[0.0] * 6]) if r["kind"] != "step" or not r["step"] % 10]
    assert kinds(judge(sparse, RUN)) == {("collapse", True)}


@pytest.mark.parametrize("name", [name for name in vars(limits) if name.isupper()])
def test_the_page_states_every_limit(name: str) -> None:
    page = (Path(__file__).parents[2] / "docs" / "verdicts.md").read_text()
    assert re.search(rf"(?<![\d.]){getattr(limits, name):g}(?![\d.]\d)", page) or name == "ERRORS", name
    assert "four standard" in page and limits.ERRORS == 4


def test_the_page_has_every_kind() -> None:
    root = Path(__file__).parents[2]
    page = (root / "docs" / "verdicts.md").read_text()
    sources = "".join(path.read_text() for path in (root / "manyhands" / "compare").glob("*.py"))
    found = set(re.findall(r'Finding\(\s*"(\w+)"', sources))
    assert len(found) > 10 and found == set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
