"""Each measure on routings whose answer is known, and under a change of the experts' names."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from manyhands.errors import DataError
from manyhands.inspect.balance import coactivation, expected_overlap, load, over_time
from manyhands.inspect.compare import agreement, check_same, saturation
from manyhands.inspect.findings import measure, plain
from manyhands.inspect.observed import overlap
from manyhands.inspect.predict import predictability
from manyhands.inspect.resample import Resampler
from manyhands.inspect.specialise import domains, vocabulary

from .routings import drawn, observed


def test_all_pairs_of_a_token_are_counted_not_neighbours_in_the_list() -> None:
    seen = observed(np.tile([0, 1, 2], (30, 1))[:, None], texts=3)
    found = coactivation(seen, 0)
    assert {tuple(pair["experts"]) for pair in found["strongest"]} <= {(0, 1), (0, 2), (1, 2)}
    assert np.isfinite(found["lift"][0, 2]) and found["lift"][0, 2] == pytest.approx(1)


def test_experts_that_go_together_stand_out_and_independent_ones_do_not() -> None:
    pairs = np.random.default_rng(0).integers(0, 4, 4000)
    together = observed(np.stack([2 * pairs, 2 * pairs + 1], -1)[:, None])
    found = coactivation(together, 0)
    assert [pair["lift"] for pair in found["strongest"]] == pytest.approx([7] * 4, rel=0.1)
    assert {tuple(pair["experts"]) for pair in found["strongest"]} == {(0, 1), (2, 3), (4, 5), (6, 7)}
    independent = coactivation(observed(drawn(20_000, 1, 8, 2)), 0)
    assert independent["mean_abs_log2_lift"] < 0.1 < found["mean_abs_log2_lift"]


def test_load_of_even_and_of_one_sided_routing() -> None:
    even = load(observed(np.arange(80)[:, None, None] % 8), 0)
    assert (even["max_vio"], even["cv_squared"], even["dead"]) == (0, 0, [])
    assert even["gini"] == pytest.approx(0) and even["entropy"] == pytest.approx(1)
    one = load(observed(np.zeros((80, 1, 1))), 0)
    assert one["max_vio"] == 7 and one["dead"] == list(range(1, 8)) and one["gini"] == pytest.approx(7 / 8)


def test_overlap_in_time_stays_within_sequences() -> None:
    seen = observed(np.repeat(np.arange(40) % 8, 10)[:, None, None], texts=40)
    found = over_time(seen, 0, Resampler(seen))
    assert [figure.value for figure in found.values()] == [1] * 8
    assert found[1].samples == 40 * 9 and found[8].samples == 40 * 2
    assert found[1].shuffled == pytest.approx(1 / 8)
    drawn_ids = drawn(20_000, 1, 8, 2)
    unrelated = observed(drawn_ids)
    assert over_time(unrelated, 0, Resampler(unrelated))[1].value == pytest.approx(2 / 8, abs=0.01)
    assert expected_overlap(drawn_ids[:, 0], drawn_ids[:, 0], 8) == pytest.approx(2 / 8, abs=0.01)


def test_overlap_counts_experts_once_and_skips_tokens_without() -> None:
    a, b = np.array([[0, 1], [2, -1], [-1, -1]]), np.array([[1, 0], [-1, 3], [0, 1]])
    assert overlap(a, b)[:2].tolist() == [1.0, 0.0] and math.isnan(overlap(a, b)[2])


def test_what_the_token_decides_is_foretold_from_it_and_on_other_texts() -> None:
    token = np.random.default_rng(0).integers(0, 20, 4000)
    ids = np.stack([token % 8, (token + 3) % 8], -1)[:, None]
    seen = observed(ids, token)
    found = predictability(seen, 0, Resampler(seen))
    assert found["token id"].value == 1 and found["constant"].value < 0.5
    alone = observed(ids, np.arange(4000))  # each id once: nothing learned on the other half helps
    found = predictability(alone, 0, Resampler(alone))
    assert found["token id"].value == pytest.approx(found["constant"].value, abs=0.02)


def test_what_the_layer_below_decides_is_foretold_from_it() -> None:
    below = drawn(4000, 1, 8, 2)[:, 0]
    seen = observed(np.stack([below, 7 - below], 1))
    found = predictability(seen, 1, Resampler(seen))
    assert found["previous layer"].value > 0.95 and found["previous token"].value == pytest.approx(0.25, abs=0.03)
    assert "previous layer" not in predictability(seen, 0, Resampler(seen))


def test_vocabulary_share_and_its_null() -> None:
    token = np.random.default_rng(0).integers(0, 20, 4000)
    decided = observed((token % 8)[:, None, None], token)
    found = vocabulary(decided, 0, Resampler(decided))
    assert found["share"].value == 1 and found["share"].shuffled < 0.3
    unrelated = observed(drawn(4000, 1, 8, 1), token)
    found = vocabulary(unrelated, 0, Resampler(unrelated))
    assert found["share"].value == pytest.approx(found["share"].shuffled, abs=0.02)
    assert abs(found["bits"].value) < 0.02


def test_domains_are_told_where_they_show_and_not_where_texts_only_differ() -> None:
    domain = np.arange(40) % 2
    rng = np.random.default_rng(0)
    tokens = np.arange(8000) * 40 // 8000
    clear = observed(
        ((rng.integers(0, 4, 8000)) + 4 * domain[tokens])[:, None, None], domain=domain, domains=("a", "b")
    )
    found = domains(clear, 0, Resampler(clear))
    assert found["bits"].value == pytest.approx(1, abs=0.1) and found["window"].value == 1
    assert found["share"].sum(1) == pytest.approx([1, 1])
    # Each text has an expert of its own choice: the domain, dealt at random over texts, explains nothing.
    favourite = rng.integers(0, 8, 40)
    own = observed(favourite[tokens][:, None, None], domain=domain, domains=("a", "b"))
    found = domains(own, 0, Resampler(own))
    assert found["bits"].shuffled > 0.05, "tokens dealt one by one would show far less"
    assert found["bits"].value < 4 * found["bits"].shuffled_sd


def test_agreement_and_saturation() -> None:
    a = observed(drawn(2000, 2, 8, 2))
    b = observed(drawn(2000, 2, 8, 2, seed=1))
    sampled = Resampler(a)
    same, other = agreement(a, a, sampled)[0], agreement(a, b, sampled)[1]
    assert same["experts"].value == same["first_expert"].value == 1 and same["load_moved"] == 0
    assert other["experts"].value == pytest.approx(other["experts"].shuffled, abs=0.02)
    rows = saturation([("1", b), ("2", a)], sampled)
    assert [figure.value for figure in rows[-1]["layers"]] == [1, 1]
    with pytest.raises(DataError, match="token 0 is not the same in both"):
        check_same(a, replace(b, token_ids=b.token_ids + 1), ("one", "two"))
    with pytest.raises(DataError, match="sparse layers"):
        check_same(a, observed(drawn(2000, 1, 8, 2)), ("one", "two"))


def test_nothing_depends_on_the_experts_names() -> None:
    token = np.random.default_rng(0).integers(0, 20, 3000)
    ids = np.where(
        np.random.default_rng(1).random((3000, 2, 1)) < 0.5, (token % 8)[:, None, None], drawn(3000, 2, 8, 1)
    )
    domain = np.arange(40) % 2
    seen = observed(ids, token, domain=domain, domains=("a", "b"), tag=token % 5, tags=tuple("ABCDE"))
    renamed = replace(seen, expert_ids=np.random.default_rng(2).permutation(8).astype(np.int32)[seen.expert_ids])
    for one, two in zip(measure(seen, 20)["layers"], measure(renamed, 20)["layers"], strict=True):
        for kind, what in (
            ("vocabulary", "share"),
            ("syntax", "bits"),
            ("syntax", "bits_given_token"),
            ("domains", "bits"),
        ):
            assert one[kind][what].value == pytest.approx(two[kind][what].value, abs=1e-9)
        assert one["load"]["max_vio"] == two["load"]["max_vio"]
        assert one["over_time"][3].value == two["over_time"][3].value


def test_findings_are_strict_json() -> None:
    found = plain(measure(observed(drawn(300, 2, 8, 2), np.full(300, -1)), 20))
    again = json.loads(json.dumps(found, allow_nan=False))
    assert again == found and "vocabulary" not in found["layers"][0]
    assert found["layers"][0]["over_time"]["1"]["random"] is None
