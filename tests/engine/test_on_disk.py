"""An engine whose experts are on disk: the same answers in any company, its counts, and a disk that fails."""

import os

import pytest

from manyhands.config import SamplingConfig
from manyhands.engine import ledger
from manyhands.engine.counters import Counters
from manyhands.engine.engine import Engine
from manyhands.errors import ManyhandsError
from manyhands.kernels import native
from manyhands.store import disk

from ..runtime.test_program import CASES, packed_model
from ..store.stored_model import stored_model

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no native kernels: {native.missing()}")
PROMPTS = [[5, 6, 7], [9] * 20, [1], list(range(30)), [4, 4], [30, 2, 8, 9], [11] * 9, [3, 1]]
GREEDY = SamplingConfig(max_new_tokens=10, temperature=0.0)


def engine_of(model, **how):
    return Engine(model, max_sequences=8, **how)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_the_same_answers_in_any_company(tmp_path, format) -> None:
    model = packed_model(CASES["qwen3"], format)
    expected = [c.token_ids for c in engine_of(model).generate(PROMPTS, GREEDY)]
    for slots, staged, name in [(3, 3, "lfu"), (10, 6, "lru"), (40, 8, "lfu")]:
        other, _store = stored_model(model, tmp_path / "records", slots, staged, name)
        assert [c.token_ids for c in engine_of(other).generate(PROMPTS, GREEDY)] == expected
        chunked = engine_of(other, max_batch_tokens=7)
        assert [c.token_ids for c in chunked.generate(PROMPTS, GREEDY)] == expected
        assert [engine_of(other).generate([p], GREEDY)[0].token_ids for p in PROMPTS[:3]] == expected[:3]


def test_ledgers_add_up_to_the_counters_and_to_the_disk(tmp_path) -> None:
    other, store = stored_model(packed_model(CASES["qwen3"], "int8"), tmp_path / "records", 12, 8)
    engine = engine_of(other)
    counters = Counters(other.config, ledger.bytes_of_experts(other))
    requests = engine.add_all(PROMPTS, GREEDY)
    ledgers = {request.id: ledger.Ledger() for request in requests}
    while engine.busy:
        engine.step()
        ran = engine.ran
        counters.step(ran.routed, 0, ran.reads)
        kept = [ledgers[request.id] for request in ran.requests]
        ledger.step(counters.sizes, ran.routed.layers, ran.starts, kept, ran.reads)
    assert counters.bytes_disk == store.num_bytes == sum(one.bytes_disk for one in ledgers.values()) > 0
    assert counters.bytes_disk == counters.misses * store.slot_bytes
    assert 0 < counters.misses < counters.lookups and counters.stalled > 0
    for one in ledgers.values():
        report = one.report()
        assert 0 <= report["experts"]["hit_rate"] < 1 and report["experts"]["bytes_disk"] > 0
        assert 0 < report["stall_ms"] <= 1000 * counters.stalled + 1e-6


def test_who_wants_what_cannot_be_read_fails_and_nobody_else(tmp_path, monkeypatch) -> None:
    model = packed_model(CASES["qwen3"], "int8")
    expected = [c.token_ids for c in engine_of(model).generate(PROMPTS, GREEDY)]
    other, store = stored_model(model, tmp_path / "records", 3, 3)
    bad = store.layers[1].offset + 4 * store.slot_bytes
    real = os.preadv

    def broken(fd, views, offset):
        if offset == bad:
            raise OSError(5, "Input/output error")
        return real(fd, views, offset)

    monkeypatch.setattr(disk.os, "preadv", broken)
    engine = engine_of(other)
    requests = engine.add_all(PROMPTS, GREEDY)
    while engine.busy:
        engine.step()
    failed = [request for request in requests if request.finish_reason == "error"]
    assert failed and all("cannot be read: Input/output error" in request.error for request in failed)
    for request, right in zip(requests, expected, strict=True):
        assert request in failed or list(request.token_ids) == right
    assert len(failed) < len(requests), "choose another expert"
    with pytest.raises(ManyhandsError, match="cannot be read: Input/output error"):
        engine.generate(PROMPTS, GREEDY)
    monkeypatch.undo()
    assert [c.token_ids for c in engine.generate(PROMPTS, GREEDY)] == expected
    assert engine.scheduler.max_sequences == 8
