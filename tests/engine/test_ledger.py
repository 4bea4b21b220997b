"""A step's bytes dealt out to those that had them read: whole, and all of them."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from manyhands.engine import ledger
from manyhands.engine.counters import Counters
from manyhands.engine.engine import Engine


@given(st.integers(1, 10**9), st.lists(st.lists(st.integers(0, 50), min_size=3, max_size=3), min_size=1, max_size=9))
def test_shares_add_up_and_follow_the_tokens(size, counts):
    counts_RE = np.array(counts, dtype=np.int64)
    found = ledger.shares(size, counts_RE)
    total = counts_RE.sum(0)
    assert np.array_equal(found.sum(0), np.where(total > 0, size, 0))
    assert (found >= 0).all() and not found[counts_RE == 0].any()
    exact = size * counts_RE / np.maximum(total, 1)
    assert (np.abs(found - exact) <= 1).all()


def test_a_ledger_of_each_request_and_the_counters(make, tokenizer):
    engine = Engine(make(), tokenizer)
    sizes = ledger.bytes_of_experts(engine.model)
    per_expert = 4 * 3 * 16 * 32  # float32, three matrices
    assert sizes == {1: per_expert, 2: per_expert}
    counters, requests = (
        Counters(engine.model.config, sizes),
        [engine.add([5, 6, 7]), engine.add([9] * 4), engine.add([1])],
    )
    kept = {request.id: ledger.Ledger() for request in requests[:2]}
    third = ledger.Ledger()
    for _ in range(6):
        engine.step()
        ran = engine.ran
        counters.step(ran.routed, 0)
        ledger.step(sizes, ran.routed.layers, ran.starts, [kept.get(r.id, third) for r in ran.requests])
    everyone = [*kept.values(), third]
    assert sum(one.bytes_ram for one in everyone) == counters.bytes_ram
    assert counters.lookups * per_expert == counters.bytes_ram
    assert {one.steps for one in everyone} == {6} and third.report()["batch_mean"] == 3
    assert all(4 <= one.distinct <= 8 and one.lookups >= 6 * 4 for one in everyone)
