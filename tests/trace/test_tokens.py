import math

import pytest
import torch

from manyhands.trace.tokens import Measure, TokenShare, TopToken


def test_counts_agree_with_counting_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 7, (4, 30), generator=generator)
    experts = torch.rand(4, 30, 5, generator=generator).argsort(-1)[..., :2]
    mask = torch.rand(4, 30, generator=generator) > 0.2
    share = TokenShare(num_experts=5, vocab_size=7)
    share.add(2, ids[:2], experts[:2], mask[:2])
    share.add(2, ids[2:], experts[2:], mask[2:])

    triples = [(int(ids[b, s]), [int(e) for e in experts[b, s]]) for b in range(4) for s in range(30) if mask[b, s]]
    for expert in range(5):
        load = sum(expert in chosen for _, chosen in triples) / (2 * len(triples))
        assert share.load(2)[expert] == pytest.approx(load)
        for top in share.top_tokens(2, expert, n=7, min_count=1):
            here = [chosen for token, chosen in triples if token == top.token_id]
            visits = sum(expert in chosen for chosen in here)
            assert top == TopToken(
                top.token_id, visits / (2 * len(here)), visits, pytest.approx(visits / (2 * len(here)) / load)
            )
    pairs = [(b, s) for b in range(4) for s in range(29) if mask[b, s] and mask[b, s + 1]]
    same = sum(int(experts[b, s, 0]) == int(experts[b, s + 1, 0]) for b, s in pairs)
    assert share.repetition(2)[::2] == (same / len(pairs), len(pairs))
    assert share.layers == [2]


def test_no_expert_and_padding_are_not_counted() -> None:
    share = TokenShare(2, 3)
    share.add(0, torch.tensor([0, 1, 2]), torch.tensor([[0, -1], [1, 0], [1, 0]]), torch.tensor([True, True, False]))
    assert share.load(0) == pytest.approx([2 / 3, 1 / 3])
    assert share.repetition(0).samples == 1
    share.add(1, torch.tensor([0]), torch.tensor([[0, 1]]), torch.tensor([False]))
    assert share.layers == [0]


def test_a_token_beyond_the_vocabulary_is_not_counted_for_the_next_expert() -> None:
    with pytest.raises(AssertionError, match="vocabulary"):
        TokenShare(2, 3).add(0, torch.tensor([3]), torch.tensor([[0]]))


def test_top_tokens_order_and_least_count() -> None:
    share = TokenShare(2, 4)
    ids = torch.tensor([0] * 20 + [1] * 20 + [2] * 3)
    first = torch.tensor([0] * 15 + [1] * 5 + [0] * 5 + [1] * 15 + [0] * 3)
    share.add(0, ids, first[:, None])
    assert [top.token_id for top in share.top_tokens(0, 0, min_count=10)] == [0, 1]
    assert [top.token_id for top in share.top_tokens(0, 0, min_count=1)] == [2, 0, 1]
    best = share.top_tokens(0, 0, n=1, min_count=10)[0]
    assert best == TopToken(0, 0.75, 15, pytest.approx(0.75 / (23 / 43)))


def test_specialisation_of_a_router_that_reads_the_token_id_is_one() -> None:
    share = TokenShare(8, 64)
    ids = torch.arange(6400) % 64
    share.add(0, ids, (ids % 8)[:, None])
    measure = share.vocabulary_specialisation(0)
    assert measure.value == 1.0 and measure.samples == 64
    assert 1 / 8 < measure.null < 0.25


def test_specialisation_of_a_random_router_is_its_null_and_the_null_is_above_one_over_e() -> None:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 500, (20_000,), generator=generator)
    load = torch.tensor([4.0, 1, 1, 1, 1, 1, 1, 2])
    experts = torch.multinomial(load.expand(20_000, 8), 2, generator=generator)
    share = TokenShare(8, 500)
    share.add(0, ids, experts)
    measure = share.vocabulary_specialisation(0)
    assert measure.value == pytest.approx(measure.null, abs=0.01)
    assert measure.null > max(float((experts[:, 0] == e).float().mean()) for e in range(8))
    repetition = share.repetition(0)
    assert repetition.value == pytest.approx(repetition.null, abs=0.01)
    assert repetition.null > 1 / 8


def test_scores_do_not_depend_on_the_experts_numbers() -> None:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 20, (3000,), generator=generator)
    experts = (ids + torch.randint(0, 3, (3000,), generator=generator)) % 6
    measures: list[Measure] = []
    for order in (torch.arange(6), torch.tensor([3, 5, 0, 1, 4, 2])):
        share = TokenShare(6, 20)
        share.add(0, ids, order[experts][:, None])
        measures.append(share.vocabulary_specialisation(0))
    assert measures[0].value == pytest.approx(measures[1].value)
    assert measures[0].null == pytest.approx(measures[1].null, abs=0.01)


def test_too_little_text_has_no_score() -> None:
    share = TokenShare(2, 3)
    share.add(0, torch.tensor([0]), torch.tensor([[1]]))
    assert math.isnan(share.vocabulary_specialisation(0).value)
    assert math.isnan(share.repetition(0).value)
    assert share.top_tokens(0, 0) == []


def test_rows_are_separate_texts() -> None:
    share = TokenShare(2, 3)
    share.add(0, torch.tensor([[0, 1], [2, 0]]), torch.tensor([[[0], [1]], [[1], [0]]]))
    assert share.repetition(0).samples == 2 and share.repetition(0).value == 0.0
