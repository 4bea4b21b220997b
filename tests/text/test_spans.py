"""Span corruption: nothing of the text is lost, the lengths are T5's, and a saved position is exact."""

import itertools
import json

import numpy as np
import pytest
import torch

from manyhands.errors import CheckpointError, ConfigError, DataError
from manyhands.text.pairs import PairBatch
from manyhands.text.spans import SpanBatches, SpanRule, span_evaluation
from manyhands.text.walk import bits_of

EOS = 1
SENTINELS = list(range(20_100, 20_000, -1))
RULE = SpanRule(SENTINELS, EOS)
TOKENS = np.arange(2, 10_002, dtype=np.uint16)


def take(batches: SpanBatches, count: int) -> list[PairBatch]:
    return list(itertools.islice(batches, count))


def equal(a: list[PairBatch], b: list[PairBatch]) -> bool:
    same = (
        torch.equal(x.ids_BS, y.ids_BS) and torch.equal(x.labels_BT, y.labels_BT) for x, y in zip(a, b, strict=True)
    )
    return len(a) == len(b) and all(same)


def text_of(read: list[int], written: list[int]) -> list[int]:
    """Both together again: each sentinel that was read stands for what follows it where it was written."""
    assert read[-1] == written[-1] == EOS
    spans: dict[int, list[int]] = {}
    for token in written[:-1]:
        if token in SENTINELS:
            spans[token] = here = []
        else:
            here.append(token)
    assert all(spans.values()) and list(spans) == SENTINELS[: len(spans)] == [t for t in read if t in SENTINELS]
    return [token for place in read[:-1] for token in spans.get(place, [place])]


@pytest.mark.parametrize(
    ("read", "text", "written"),
    [(512, 568, 114), (128, 141, 29), (64, 70, 14)],  # the first: T5's and Switch's
)
def test_the_lengths_are_the_published_ones(read: int, text: int, written: int) -> None:
    assert RULE.text_length(read) == text
    assert RULE.lengths(text) == (read, written)


@pytest.mark.parametrize("length", [2, 3, 4, 7, 20, 141, 568])
@pytest.mark.parametrize("density", [0.01, 0.15, 0.5, 0.9])
def test_a_text_is_what_is_read_and_written_together(length: int, density: float) -> None:
    rule = SpanRule(SENTINELS, EOS, density, 6.0)
    batch = rule.batch(TOKENS[: 3 * length].reshape(3, length).astype(np.int64), [bits_of(7, row) for row in range(3)])
    assert (batch.ids_BS.shape[1], batch.labels_BT.shape[1]) == rule.lengths(length)
    assert batch.mask_BS.all() and batch.mask_BS.shape == batch.ids_BS.shape
    for row in range(3):
        text = TOKENS[row * length : (row + 1) * length].tolist()
        assert text_of(batch.ids_BS[row].tolist(), batch.labels_BT[row].tolist()) == text


def test_a_vector_by_hand() -> None:
    mask_BL = np.array([[0, 0, 1, 1, 0, 1]], dtype=bool)
    read, written = RULE.corrupt(np.array([[5, 6, 7, 8, 9, 10]]), mask_BL)
    assert read.tolist() == [[5, 6, 20_100, 9, 20_099, EOS]]
    assert written.tolist() == [[20_100, 7, 8, 20_099, 10, EOS]]


def test_the_spans_are_pinned() -> None:
    """A run resumes on the same spans under a later version of NumPy or of this file."""
    [row] = RULE.mask(60, [bits_of(0, 1, 2)])
    assert np.flatnonzero(row).tolist() == [23, 24, 25, 26, 38, 56, 57, 58, 59]


def test_spans_are_spread_evenly() -> None:
    """Of 20 tokens 3 are lost in one span, 6 of 40 in two: a place in the middle as often as the next one."""
    rows = RULE.mask(40, [bits_of(row) for row in range(4000)])
    assert (rows.sum(1) == 6).all() and not rows[:, 0].any() and rows[:, -1].all()
    middle = rows[:, 5:30].mean(0)
    assert middle.max() - middle.min() < 5 * np.sqrt(2 * 0.1 / 4000)  # five deviations of a difference of two shares


def test_rows_do_not_depend_on_the_batch_and_epochs_differ() -> None:
    one, four = SpanBatches(TOKENS, RULE, 128, 1, seed=3), SpanBatches(TOKENS, RULE, 128, 4, seed=3)
    rows = [next(one) for _ in range(4)]
    [batch] = take(four, 1)
    assert torch.equal(torch.cat([row.ids_BS for row in rows]), batch.ids_BS)
    texts = len(TOKENS) // 141
    again = take(SpanBatches(TOKENS[: 141 * 2], RULE, 128, 1, seed=3), 8)
    assert len({tuple(row.labels_BT[0].tolist()) for row in again}) == 8
    assert texts > 4 and not equal(take(SpanBatches(TOKENS, RULE, 128, 4, seed=4), 1), [batch])


@pytest.mark.parametrize("stop", [0, 1, 17, 18, 36])  # 70 or 71 texts an epoch: before, at and after its end
def test_resume_is_exact(stop: int) -> None:
    batches = SpanBatches(TOKENS, RULE, 128, 4, seed=5, sha256="a" * 64)
    take(batches, stop)
    state = json.loads(json.dumps(batches.state_dict()))
    expected = take(batches, 20)
    resumed = SpanBatches(TOKENS, RULE, 128, 4, seed=5, sha256="a" * 64)
    take(resumed, 3)
    resumed.load_state_dict(state)
    assert equal(take(resumed, 20), expected)


def test_order_does_not_depend_on_world_size() -> None:
    expected = take(SpanBatches(TOKENS, RULE, 64, 4, 0), 5)
    parts = [take(SpanBatches(TOKENS, RULE, 64, 4, 0, rank, 2), 5) for rank in range(2)]
    for whole, *halves in zip(expected, *parts, strict=True):
        assert torch.equal(torch.cat([half.labels_BT for half in halves]), whole.labels_BT)


@pytest.mark.parametrize("name", ["noise_density", "mean_span_length", "sequence_length", "seed", "sha256"])
def test_a_position_in_something_else_is_refused(name: str) -> None:
    batches = SpanBatches(TOKENS, RULE, 128, 4, seed=0, sha256="a" * 64)
    with pytest.raises(CheckpointError, match=name):
        batches.load_state_dict({**batches.state_dict(), name: 0.25})


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(ConfigError, match=r"28 spans.* 27 sentinels"):
        SpanRule(SENTINELS[:27], EOS).text_length(512)
    with pytest.raises(ConfigError, match="sequence_length = 2"):
        RULE.text_length(2)
    with pytest.raises(DataError, match="140 tokens are too few for one text of 141"):
        SpanBatches(TOKENS[:140], RULE, 128, 4, seed=0)
    assert len(next(SpanBatches(TOKENS[:141], RULE, 128, 4, seed=0))) == 4
    with pytest.raises(DataError, match="1 tokens"):
        span_evaluation(TOKENS[:1], RULE, 128, 4)


@pytest.mark.parametrize("count", [2, 100, 141, 142, 143, 141 * 5, 141 * 5 + 7])
def test_evaluation_asks_about_the_whole_text(count: int) -> None:
    batches = list(span_evaluation(TOKENS[:count], RULE, 128, 2))
    text = [
        token
        for batch in batches
        for read, written in zip(batch.ids_BS.tolist(), batch.labels_BT.tolist(), strict=True)
        for token in text_of(read, written)
    ]
    assert text == TOKENS[: count - (count % 141 == 1)].tolist()  # one token alone cannot be read and written
    assert equal(batches, list(span_evaluation(TOKENS[:count], RULE, 128, 2)))
    assert len(list(span_evaluation(TOKENS[:count], RULE, 128, 2, max_batches=1))) == 1
