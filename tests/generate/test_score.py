"""Scores are the log-softmax of the model's logits, whatever is scored beside them and whatever is shared."""

import pytest
import torch

from manyhands.engine.runner import Runner
from manyhands.errors import ManyhandsError, UserError
from manyhands.generate.score import Score, Scorer
from manyhands.kernels import native

from ..runtime.test_program import CASES, packed_model

QUESTION = [5, 9, 200, 31, 7, 7, 12]
PAIRS = [
    (QUESTION, [3]),
    (QUESTION, [4]),
    (QUESTION, [3, 8, 9]),
    (QUESTION, [3, 8, 10]),
    (QUESTION[:4], [7, 7, 12, 3]),
    ([44], list(range(60, 100))),
    ([44], []),
    ([5, 9, 201], [1, 2]),
    (QUESTION, [3]),
]


def plainly(model, pairs):
    """One at a time, all logits at once."""
    found = []
    for given, scored in pairs:
        if not scored:
            found.append((0.0, True))
            continue
        ids = torch.tensor([[*given, *scored]])
        with torch.no_grad():
            logprobs = model(ids[:, :-1]).logits[0].float().log_softmax(-1)[len(given) - 1 :]
        chosen = logprobs.gather(1, torch.tensor(scored)[:, None])[:, 0]
        found.append((float(chosen.double().sum()), bool((logprobs.argmax(-1) == torch.tensor(scored)).all())))
    return found


@pytest.mark.parametrize("lanes", [1, 2, 8])
def test_scores_are_those_of_each_pair_alone(model, lanes) -> None:
    expected = plainly(model, PAIRS)
    found = Scorer(model, lanes=lanes).score(PAIRS)
    assert [score.logprob for score in found] == pytest.approx([logprob for logprob, _ in expected], abs=2e-4)
    assert [score.greedy for score in found] == [greedy for _, greedy in expected]


def test_the_most_probable_continuation_is_greedy(model) -> None:
    ids = list(QUESTION)
    for _ in range(4):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    best, other = ids[len(QUESTION) :], [*ids[len(QUESTION) : -1], (ids[-1] + 1) % 300]
    found = Scorer(model).score([(QUESTION, best), (QUESTION, other)])
    assert [score.greedy for score in found] == [True, False]


def test_what_texts_share_runs_once(make, monkeypatch) -> None:
    ran = []
    run = Runner.run

    def counted(self, batch, states=False):
        ran.append(batch.num_tokens)
        return run(self, batch, states)

    monkeypatch.setattr(Runner, "run", counted)
    model = make()
    Scorer(model, lanes=1).score([(QUESTION, [answer]) for answer in range(50)])
    assert sum(ran) == len(QUESTION), "answers of one token need nothing but the question"
    ran.clear()
    Scorer(model, lanes=2).score([([*list(range(20)), question], [1, 2]) for question in range(40)])
    assert sum(ran) == 2 * 20 + 40 * 2


def test_few_tokens_at_a_time_give_the_same(make, monkeypatch) -> None:
    model = make()
    expected = Scorer(model).score(PAIRS)
    monkeypatch.setattr("manyhands.generate.score._MOST_TOKENS", 3)
    monkeypatch.setattr("manyhands.generate.score.CHUNK_VALUES", 700)
    found = Scorer(model).score(PAIRS)
    assert [s.logprob for s in found] == pytest.approx([s.logprob for s in expected], abs=2e-4)
    assert [s.greedy for s in found] == [s.greedy for s in expected]


def test_progress_counts_pairs(make) -> None:
    seen: list[int] = []
    Scorer(make(), lanes=2).score(PAIRS, seen.append)
    assert seen == sorted(seen) and seen[-1] == len(PAIRS)


def test_nothing_to_score(make) -> None:
    scorer = Scorer(make())
    assert scorer.score([]) == []
    assert scorer.score([([1], [])]) == [Score(0.0, True)]


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        (([], [1]), "in front of it"),
        (([1], [320]), "token id 320"),
        (([-1], [3]), "token id -1"),
        (([1] * 48, [1, 1]), "max_position_embeddings = 48"),
    ],
)
def test_wrong_pairs_are_refused(make, pair, said) -> None:
    with pytest.raises(UserError, match=said):
        Scorer(make()).score([pair])


def test_a_context_can_be_full(make) -> None:
    (found,) = Scorer(make()).score([([1] * 47, [1, 2])])
    assert found.logprob < 0


def test_damaged_weights_are_said(make) -> None:
    model = make()
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    with pytest.raises(ManyhandsError, match="NaN"):
        Scorer(model).score([([1], [2])])


def test_experts_that_look_at_other_tokens_are_refused(make) -> None:
    with pytest.raises(UserError, match="cannot generate"):
        Scorer(make(moe={"router": {"num_experts": 4, "num_experts_per_tok": 2, "eval_capacity_factor": 1.0}}))


@pytest.mark.skipif(not native.available(), reason=f"no native kernels: {native.missing()}")
@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("case", ["qwen3", "latent"])
def test_packed_scores_have_the_same_bits_in_any_company(case, format) -> None:
    model = packed_model(CASES[case], format)
    pairs = [([token % 50 for token in given], [token % 50 for token in scored]) for given, scored in PAIRS]
    pairs += [([first, *range(1, 9)], [10, 11, 12]) for first in range(20, 40)]
    together = Scorer(model, lanes=3).score(pairs)
    assert together == [Scorer(model).score([pair])[0] for pair in pairs]
    assert together == Scorer(model, lanes=1).score(pairs)


@pytest.mark.skipif(not native.available(), reason=f"no native kernels: {native.missing()}")
def test_lanes_run_together_natively(monkeypatch) -> None:
    """Caches of different pools would not: the modules would run them, with other bits."""

    def run(self, batch, states):
        raise AssertionError("not native")

    monkeypatch.setattr(Runner, "_modules_run", run)
    rows = []
    original = Runner.run

    def counted(self, batch, states=False):
        rows.append(len(batch.rows))
        return original(self, batch, states)

    monkeypatch.setattr(Runner, "run", counted)
    pairs = [([first, *range(1, 9)], [10, 11, 12]) for first in range(20, 40)]
    found = Scorer(packed_model(CASES["qwen3"], "int4"), lanes=4).score(pairs)
    assert rows == [4] * 5 and len({score.logprob for score in found}) == 20
