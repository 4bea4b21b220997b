"""Wants against sets; sequences merged into common passes."""

import numpy as np
import pytest

from manyhands.errors import UserError
from manyhands.simulate import wants as module
from manyhands.simulate.tokens import Tokens
from manyhands.simulate.wants import Wants
from tests.simulate.small import some_tokens


def by_sets(tokens: Tokens) -> list[list[int]]:
    return [
        sorted(set(tokens.expert_ids[tokens.step == step, layer].ravel().tolist()) - {tokens.none})
        for step in np.unique(tokens.step)
        for layer in range(tokens.expert_ids.shape[1])
    ]


@pytest.mark.parametrize("chunk", [1, 30, 1 << 20])
def test_wants_are_the_distinct_experts_of_each_pass(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(module, "_CHUNK", chunk)
    monkeypatch.setattr(module, "_LISTED", 7)
    tokens = some_tokens()
    wants = Wants.of(tokens, [5, 6, 7])
    assert list(wants.lists()) == by_sets(tokens)
    assert wants.tokens.tolist() == [10] + [1] * 50 and wants.decode.tolist() == [False] + [True] * 50


def test_an_expert_twice_in_one_token_is_one_want() -> None:
    ids = np.array([[[3, 3]], [[255, 1]]], np.uint8)
    tokens = Tokens(ids, np.array([0, 1], np.int32), np.zeros(2, np.int32), np.ones(2, np.bool_), 255)
    assert list(Wants.of(tokens, [1]).lists()) == [[3], [1]]


def test_many_experts_keep_their_numbers() -> None:
    ids = np.array([[[300, 65534]], [[2, 300]]], np.uint16)
    tokens = Tokens(ids, np.array([4, 4], np.int32), np.zeros(2, np.int32), np.ones(2, np.bool_), 65535)
    assert list(Wants.of(tokens, [1]).lists()) == [[2, 300, 65534]]


def test_merged_texts_advance_together() -> None:
    tokens = some_tokens(T=30, prompt=6)  # decoded: 14 tokens of text 0, 10 of text 1
    merged = tokens.merged(2)
    assert not merged.cut
    assert [len(rows) for rows in np.split(merged.tokens.step, np.flatnonzero(np.diff(merged.tokens.step)) + 1)] == (
        [2] * 10 + [1] * 4
    )
    alone = tokens.one_by_one()
    for text in (0, 1):
        mine = merged.tokens.sequence == text
        np.testing.assert_array_equal(merged.tokens.expert_ids[mine], alone.expert_ids[alone.sequence == text])
        assert merged.tokens.step[mine].tolist() == list(range(mine.sum()))


def test_fewer_texts_than_sequences_are_cut_into_pieces() -> None:
    merged = some_tokens(T=30, prompt=6).merged(6)
    assert merged.cut and np.bincount(merged.tokens.step).tolist() == [6] * 4


def test_a_place_that_a_text_leaves_is_taken_by_the_next() -> None:
    tokens = some_tokens(T=30, prompt=6)
    five = Tokens(tokens.expert_ids, tokens.step, np.arange(30, dtype=np.int32) // 6, tokens.decode, 255)
    assert np.bincount(five.merged(3).tokens.step).tolist() == [3] * 6 + [1] * 6  # four texts of 6 decoded tokens


def test_more_sequences_than_tokens_are_refused() -> None:
    with pytest.raises(UserError, match="--sequences 25: the trace has 24 tokens"):
        some_tokens(T=30, prompt=6).merged(25)
