"""The engine's memory: blocks of one pool for all sequences, given back when nobody holds any."""

import pytest
import torch

from manyhands.config import SamplingConfig
from manyhands.engine.batch import Batch, Row
from manyhands.engine.caches import Caches
from manyhands.engine.engine import Engine
from manyhands.engine.prefix import Prefix
from manyhands.engine.runner import Runner
from manyhands.kernels import native
from manyhands.layers.cache import PagedCache

from .conftest import GQA, MLA

WIDE = {**GQA, "head_dim": 16}
GREEDY = SamplingConfig(temperature=0, max_new_tokens=5)
HEADS = {"native": WIDE, "as modules": GQA, "latent": {**MLA, "v_head_dim": 8}}


def rows(engine):
    return [row for pool in engine.memory.caches.pools for buffer in pool.buffers for row in [buffer.shape[0]]]


@pytest.mark.parametrize("paged", [None, True])
def test_memory_is_given_back_when_nobody_needs_it(make, paged):
    engine = Engine(make(attention=WIDE), paged=paged)
    engine.add_all([[1, 2, 3]] * 3, GREEDY)
    engine.step()
    assert engine.memory.paged(engine.runner) or not native.available()
    assert not engine.memory.paged(engine.runner) or set(rows(engine)) == {3}
    while engine.busy:
        engine.step()
    assert rows(engine) == [] and engine.scheduler.blocks.num_free == engine.scheduler.blocks.num_blocks


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("paged", [True, False])
@pytest.mark.parametrize("same", [True, False], ids=["one engine", "an engine each"])
def test_a_prefix_goes_on_in_the_same_blocks_or_in_a_copy(make, heads, paged, same):
    model, prefix, counts = make(attention=HEADS[heads]), Prefix(), []
    engine, text = Engine(model, paged=paged), list(range(20, 31))
    for _ in range(3):
        engine = engine if same else Engine(model, paged=paged)
        ran = len(prefix.ids)
        request = engine.add(text, GREEDY, prefix=prefix)
        counts.append(request.num_waiting)
        assert request.num_computed == ran
        while engine.busy:
            engine.step()
        assert request.token_ids == Engine(model).generate([text], GREEDY)[0].token_ids
        assert len(prefix.ids) == prefix.cache.length == len(text) + 4
        text = [*text, *request.token_ids, 7]
    assert counts == [11, 2, 2]
    assert engine.scheduler.blocks.num_used == (1 if paged else 0)
    prefix.clear()
    assert engine.scheduler.blocks.num_used == 0


def test_what_a_conversation_keeps_goes_when_others_need_the_room(make):
    model, prefix = make(attention=WIDE), Prefix()
    engine = Engine(model, paged=True, cache_tokens=64)
    while engine.busy or not prefix.ids:
        if not prefix.ids and not engine.busy:
            engine.add(list(range(33)), GREEDY, prefix=prefix)
        engine.step()
    assert engine.scheduler.blocks.num_free == 0
    (other,) = engine.generate([[1, 2, 3]], GREEDY)
    assert other.token_ids == Engine(model).generate([[1, 2, 3]], GREEDY)[0].token_ids and prefix.cache is None


def test_an_aborted_turn_is_kept_as_far_as_it_ran(make):
    model, prefix = make(attention=WIDE), Prefix()
    engine = Engine(model, paged=True, max_batch_tokens=4)
    request = engine.add([1, 2, 3, 4, 5, 6], GREEDY, prefix=prefix)
    engine.step()
    engine.abort(request)
    assert prefix.ids == [1, 2, 3, 4] and prefix.cache.length == 4
    assert engine.add([1, 2, 3, 4, 9], GREEDY, prefix=prefix).num_computed == 4


def test_a_batch_is_cut_where_it_is_too_long():
    batch = Batch([Row([1], None), Row([2] * 7, None, False), Row([3, 4], None)])
    parts = [[(row.ids, row.draws) for row in part.rows] for part in batch.parts(4)]
    assert parts == [[([1], True), ([2] * 3, False)], [([2] * 4, False)], [([3, 4], True)]]
    assert list(batch.parts(10)) == [batch]


@pytest.mark.parametrize("most", [1, 3, 1024])
def test_a_text_is_scored_as_it_is_alone_wherever_its_padding_is(make, most, monkeypatch):
    monkeypatch.setattr("manyhands.engine.runner.MOST_AT_ONCE", most)
    model = make(attention=WIDE)
    texts = [list(range(9)), [5, 4], [30] * 12]
    ids, left = torch.zeros(2, 3, 12, dtype=torch.long), torch.zeros(3, 12, dtype=torch.bool)
    for b, text in enumerate(texts):
        ids[0, b, : len(text)] = ids[1, b, 12 - len(text) :] = torch.tensor(text)
        left[b, 12 - len(text) :] = True
    runner = Runner(model)
    right_padded, left_padded = runner.score(ids[0], left.flip(1)), runner.score(ids[1], left)
    with torch.no_grad():
        expected = [model.hidden(torch.tensor([text])).states[0] for text in texts]
    for b, states in enumerate(expected):
        torch.testing.assert_close(right_padded.states[b][: len(states)], states, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(left_padded.states[b][-len(states) :], states, atol=1e-5, rtol=1e-5)


def test_memory_grows_and_loses_nothing(make):
    model, memory = make(attention=WIDE), Caches(3)
    runner, first, others = Runner(model), memory.new(), []
    runner.run(Batch([Row(list(range(40)), first)]))
    before = [t.clone() for layer in first.layers for t in layer.read()]
    for b in range(9):
        others.append(memory.new())
        runner.run(Batch([Row([b] * 33, others[-1])]))
    assert all(torch.equal(a, b) for a, b in zip(before, (t for x in first.layers for t in x.read()), strict=True))
    assert isinstance(first, PagedCache) and memory.blocks.num_used == 20
