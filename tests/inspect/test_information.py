"""Information in bits: against the definition, and without its bias."""

import numpy as np
import pytest

from manyhands.inspect.information import entropy, information
from manyhands.inspect.resample import Resampler, over_all, within

from .routings import drawn, observed


def by_definition(x, y, weight) -> float:
    total, bits = weight.sum(), 0.0
    for a in set(x.tolist()):
        for b in set(y.tolist()):
            p = weight[(x == a) & (y == b)].sum() / total
            if p:
                bits += p * np.log2(p / (weight[x == a].sum() / total) / (weight[y == b].sum() / total))
    return bits


def test_information_is_the_definition_with_any_weights() -> None:
    rng = np.random.default_rng(0)
    x, e, weight = rng.integers(0, 5, 300), rng.integers(0, 4, 300).astype(np.int32), rng.random(300)
    assert information(x, 4)(e, weight) == pytest.approx(by_definition(x, e, weight), abs=1e-12)
    z = rng.integers(0, 3, 300)
    parts = [by_definition(x[z == c], e[z == c], weight[z == c]) * weight[z == c].sum() for c in range(3)]
    assert information(x, 4, given=z)(e, weight) == pytest.approx(sum(parts) / weight.sum(), abs=1e-12)


def test_tokens_without_an_expert_are_left_out() -> None:
    x, e = np.array([0, 1, 0, 1, 1]), np.array([0, 1, 0, 1, -1], np.int32)
    assert information(x, 2)(e, np.ones(5)) == pytest.approx(1.0)
    assert information(x, 2)(np.full(5, -1, np.int32), np.ones(5)) == 0.0


def test_a_label_that_decides_the_expert_tells_all_of_its_entropy() -> None:
    x = np.arange(4000) % 8
    seen = observed(np.stack([x, (x + 1) % 8], -1)[:, None], texts=50)
    figure = Resampler(seen).figure(information(x, 8), [seen.expert_ids[:, 0, 0]], over_all, excess=True)
    assert figure.value + figure.shuffled == pytest.approx(entropy(np.bincount(x).astype(float))) == pytest.approx(3)


def test_unrelated_labels_tell_nothing_once_the_bias_is_off() -> None:
    x = np.random.default_rng(5).integers(0, 17, 2000)
    seen = observed(drawn(2000, 1, 8, 2), texts=50)
    first = seen.expert_ids[:, 0, 0]
    plug_in = information(x, 8)(first, np.ones(2000))
    miller = 16 * 7 / (2 * 2000 * np.log(2))
    assert plug_in == pytest.approx(miller, rel=0.3), "the bias that is subtracted is there"
    figure = Resampler(seen, draws=200).figure(information(x, 8), [first], over_all, excess=True)
    assert abs(figure.value) < 5 * figure.shuffled_sd
    assert figure.low < figure.value < figure.high


def test_the_null_within_groups_keeps_what_the_group_explains() -> None:
    group = np.arange(900) % 9
    ids = (group % 3).astype(np.int32)
    assert (within(group)(ids, np.random.default_rng(0)) == ids).all()
    mixed = np.random.default_rng(1).integers(0, 5, 900).astype(np.int32)
    dealt = within(group)(mixed, np.random.default_rng(0))
    assert (dealt != mixed).any()
    for each in range(9):
        assert sorted(dealt[group == each]) == sorted(mixed[group == each])


def test_intervals_are_over_texts() -> None:
    """Texts whose tokens all agree are as many observations as texts: √100 times wider than over tokens."""
    of_text = np.random.default_rng(0).random(40)
    seen = observed(drawn(4000, 1, 8, 2), texts=40)
    figure = Resampler(seen, draws=2000).mean([of_text[seen.text]])
    wanted = 2 * 1.96 * of_text.std() / np.sqrt(40)
    assert figure.high - figure.low == pytest.approx(wanted, rel=0.1)
    assert figure.value == pytest.approx(of_text.mean())


def test_one_text_has_no_interval() -> None:
    seen = observed(drawn(50, 1, 8, 2), texts=1)
    figure = Resampler(seen).mean([np.ones(50)])
    assert figure.value == 1 and np.isnan(figure.low) and figure.above_random is None
