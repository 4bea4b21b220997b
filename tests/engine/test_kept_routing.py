"""Who went where is complete whoever computed it, and the same as where every token is run."""

import pytest
import torch

from manyhands.config import ModelConfig, SamplingConfig, parse
from manyhands.engine.blocks import Blocks
from manyhands.engine.engine import Engine
from manyhands.engine.kept_routing import KeptRouting
from manyhands.engine.prefix import Prefix
from manyhands.kernels import native

from ..runtime.test_program import CASES, packed_model
from .conftest import build
from .test_prefix_cache import LONG, PROMPTS, SAMPLINGS, SHARED

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no native kernels: {native.missing()}")


def compare(found, right, exact=True):
    assert list(found) == list(right)
    for layer, routing in right.items():
        assert torch.equal(found[layer].expert_ids, routing.expert_ids)
        tolerance = {"atol": 0, "rtol": 0} if exact else {"atol": 1e-5, "rtol": 1e-5}
        torch.testing.assert_close(found[layer].weights, routing.weights, **tolerance)
        assert torch.equal(found[layer].kept, routing.kept) and bool(found[layer].token_mask.all())
        assert found[layer].num_experts == routing.num_experts
        assert torch.equal(found[layer].expert_counts(), routing.expert_counts())


HOW = {
    "kept": {"keep_routing": True},
    "kept, in chunks, without room for all": {"keep_routing": True, "cache_tokens": 128, "max_batch_tokens": 60},
    "not kept": {},
    "not kept, without room for all": {"cache_tokens": 128, "max_batch_tokens": 60},
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", ["qwen3", "dots", "latent"])
def test_it_is_complete_after_a_hit_on_what_others_computed(name, how):
    model, sampling = packed_model({**CASES[name], **LONG}, "int4"), SamplingConfig(max_new_tokens=40)
    prompts = [*PROMPTS, SHARED[:40]]
    right = [Engine(model, prefix_caching=False).generate([p], sampling, routing=True)[0].routings for p in prompts]
    engine = Engine(model, **HOW[how])
    engine.generate([[*SHARED, 4]], SAMPLINGS[0])  # nobody asks
    requests = engine.add_all(prompts, sampling, routing=True)
    while engine.busy:
        engine.step()
        for request in requests:
            if request.num_computed:
                rows = {len(r.expert_ids) for r in engine.completion(request).routings.values()}
                assert rows == {request.num_computed}, "at any time"
    for request, expected in zip(requests, right, strict=True):
        compare(engine.completion(request).routings, expected)
    assert any(r.num_cached for r in requests) == ("not" not in how)
    assert bool(engine.scheduler.num_preemptions) == ("room" in how)


def test_of_a_prompt_that_runs_in_parts(monkeypatch):
    monkeypatch.setattr("manyhands.engine.runner.MOST_AT_ONCE", 16)
    model = packed_model({**CASES["qwen3"], **LONG}, "int4")
    (right,) = Engine(model).generate([SHARED], SAMPLINGS[0], routing=True)
    (found,) = Engine(model, keep_routing=True).generate([SHARED], SAMPLINGS[0], routing=True)
    compare(found.routings, right.routings)


def test_where_parts_are_modules_and_caches_in_one_piece():
    model = build(max_position_embeddings=256)  # heads too narrow for native attention
    (right,) = Engine(model).generate([SHARED], SAMPLINGS[0], routing=True)
    for how in ({"paged": True}, {"paged": False}, {"cache_bytes": 1 << 22}):
        engine = Engine(model, keep_routing=True, **how)
        for _ in range(2):
            (found,) = engine.generate([SHARED], SAMPLINGS[0], routing=True)
            assert found.token_ids == right.token_ids
            compare(found.routings, right.routings, exact=False)


def test_what_a_conversation_kept_elsewhere_leaves_no_gap():
    model, prefix = packed_model({**CASES["qwen3"], **LONG}, "int4"), Prefix()
    (right,) = Engine(model).generate([SHARED], SAMPLINGS[0], routing=True)
    for keep in (False, True):
        engine = Engine(model, keep_routing=keep)
        engine.add(SHARED, SAMPLINGS[0], prefix=prefix)
        while engine.busy:
            engine.step()
        (found,) = engine.generate([SHARED], SAMPLINGS[0], routing=True)
        compare(found.routings, right.routings)


@pytest.mark.parametrize("paged", [True, False])
def test_who_wants_all_of_a_prompt_runs_all_of_it(paged):
    """Whatever a conversation or the cache has of it."""
    model, prefix, greedy = packed_model({**CASES["qwen3"], **LONG}, "int4"), Prefix(), {"temperature": 0.0}
    scores = SamplingConfig(prompt_logprobs=2, max_new_tokens=3, **greedy)
    (right,) = Engine(model, paged=paged).generate([SHARED], scores, routing=True)
    engine = Engine(model, paged=paged)
    for sampling, routing in ((SAMPLINGS[0], False), (scores, False), (SAMPLINGS[0], True), (scores, True)):
        request = engine.add(SHARED, sampling, prefix=prefix, routing=routing)
        while engine.busy:
            engine.step()
        found = engine.completion(request)
        assert request.num_cached == 0
        if sampling is scores:
            assert found.prompt_logprobs == right.prompt_logprobs and found.token_ids == right.token_ids
            assert found.prompt_logprobs[0] is None and None not in found.prompt_logprobs[1:]
        if routing:
            assert {len(r.expert_ids) for r in found.routings.values()} == {len(SHARED) + len(found.token_ids) - 1}


def test_a_dense_model_keeps_nothing_and_a_budget_counts_it():
    dense = packed_model({**CASES["qwen3"], **LONG, "moe": None}, "int4")
    assert Engine(dense, keep_routing=True).generate([SHARED], SAMPLINGS[0], routing=True)[0].routings == {}
    model = packed_model({**CASES["qwen3"], **LONG}, "int4")
    plain, token = Engine(model).cache_bytes_per_token, Engine(model, keep_routing=True).cache_bytes_per_token
    assert token == plain + 3 * 3 * 5
    engine = Engine(model, keep_routing=True, cache_bytes=4 * 32 * token)
    engine.generate([SHARED], SAMPLINGS[0])
    pools = sum(buffer.nbytes for pool in engine.memory.caches.pools for buffer in pool.buffers)
    assert pools + engine.memory.kept.nbytes == 4 * 32 * token
    engine = Engine(model, keep_routing=True, prefix_caching=False)
    engine.generate([SHARED], SAMPLINGS[0])
    assert engine.memory.kept.nbytes == 0, "given back"


@pytest.mark.parametrize("E", [4, 255, 256, 300])
def test_every_number_of_an_expert_and_none(E):
    moe = {"router": {"num_experts": E, "num_experts_per_tok": 2}, "moe_intermediate_size": 8}
    values = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 2, "max_position_embeddings": 64, "moe": moe}
    kept = KeptRouting(parse(ModelConfig, {**values, "intermediate_size": 8}), 10)
    blocks = Blocks(10)
    tables = [blocks.new_table() for _ in range(2)]
    for table, length in zip(tables, (40, 7), strict=True):
        table.grow(length)
    ids = torch.randint(-1, E, (2, 47, 2))
    ids[0, 0, 0], ids[0, 0, 1] = E - 1, -1
    weights = torch.rand(2, 47, 2)
    for first, count in ((0, 33), (33, 7)):  # in two passes
        kept.write([(tables[0], first, count)], ids[:, first : first + count], weights[:, first : first + count])
    kept.write([(tables[1], 0, 7)], ids[:, 40:], weights[:, 40:])
    for table, rows in ((tables[0], slice(0, 40)), (tables[1], slice(40, 47))):
        found = kept.read(table, rows.stop - rows.start)
        for i, routing in enumerate(found.values()):
            assert torch.equal(routing.expert_ids, ids[i, rows]) and torch.equal(routing.weights, weights[i, rows])
            assert torch.equal(routing.kept, ids[i, rows] >= 0) and bool(routing.scores.isnan().all())


def test_no_token_changes():
    model, sampling = packed_model({**CASES["qwen3"], **LONG}, "int8"), SamplingConfig(max_new_tokens=9, seed=4)
    texts = [Engine(model, keep_routing=keep).generate(PROMPTS, sampling) for keep in (False, True)]
    assert [c.token_ids for c in texts[0]] == [c.token_ids for c in texts[1]]
