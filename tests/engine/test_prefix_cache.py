"""What is found in the cache changes no bit of what a request says; what other weights computed is not found."""

import pytest
import torch

from manyhands.config import SamplingConfig
from manyhands.engine.engine import Engine
from manyhands.engine.state import state_of
from manyhands.errors import UserError
from manyhands.kernels import native

from ..runtime.test_program import CASES, packed_model

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no native kernels: {native.missing()}")

MODELS = {"gqa": "qwen3", "window, sinks, biases": "gpt-oss", "groups, shared": "dots", "latent": "latent"}
LONG = {"max_position_embeddings": 256}
SHARED = torch.randint(0, 50, (70,), generator=torch.Generator().manual_seed(5)).tolist()
PROMPTS = [[*SHARED, 1, 2, 3], [*SHARED, 9], SHARED[:64], [*SHARED[:40], 7, 7, 7, 7], [*SHARED, 1, 2, 3]]
SAMPLINGS = [SamplingConfig(max_new_tokens=6, seed=s) for s in range(5)]


def logits_of(engine):
    """By request's number, the logits of each of its tokens; filled while the engine runs."""
    found, run = {}, engine.runner.run

    def spy(batch, states=False):
        who = {id(state_of(r).cache): r for r in engine.scheduler.running}
        forward = run(batch, states)
        for row, logits in zip(batch.drawing, forward.logits, strict=True):
            found.setdefault(who[id(batch.rows[row].cache)].id, []).append(logits.clone())
        return forward

    engine.runner.run = spy
    return found


def alone(model, **how):
    found = []
    for prompt, sampling in zip(PROMPTS, SAMPLINGS, strict=True):
        engine = Engine(model, prefix_caching=False, **how)
        logits = logits_of(engine)
        (completion,) = engine.generate([prompt], sampling)
        found.append((completion.token_ids, torch.stack(logits[0])))
    return found


HOW = {
    "one after the other": ({"max_sequences": 1}, [0, 64, 32, 32, 64]),
    "together": ({}, [0, 64, 32, 32, 64]),
    "in chunks": ({"max_batch_tokens": 9}, [0, 64, 32, 32, 64]),
    "without room for all": ({"cache_tokens": 128, "max_batch_tokens": 40}, None),
}


@pytest.mark.parametrize(
    ("name", "format"), [*((n, f) for n in MODELS for f in ("int4", "int8")), ("latent", "plain"), ("gqa", "plain")]
)
def test_every_bit_is_as_alone(name, format):
    model, exact = packed_model({**CASES[MODELS[name]], **LONG}, format), format == "plain"
    expected = alone(model, exact=exact)
    for case, (how, cached) in HOW.items():
        engine = Engine(model, exact=exact, **how)
        logits = logits_of(engine)
        requests = engine.add_all(PROMPTS, SAMPLINGS)
        while engine.busy:
            engine.step()
        assert [r.token_ids for r in requests] == [ids for ids, _ in expected], case
        assert all(torch.equal(torch.stack(logits[i]), right) for i, (_, right) in enumerate(expected)), case
        assert cached in (None, [r.num_cached for r in requests]), case
        assert cached or engine.scheduler.num_preemptions, case


@pytest.mark.parametrize("how", [{"paged": True}, {"paged": False}, {"cache_bytes": 1 << 20}])
def test_parts_that_are_no_native_ones_too(how, monkeypatch):
    monkeypatch.setattr("manyhands.kernels.native.step.direct", lambda x: False)
    for name in ("qwen3", "gpt-oss", "latent"):
        model = packed_model({**CASES[name], **LONG}, "plain")
        expected = alone(model, paged=False)
        engine = Engine(model, max_sequences=2, max_batch_tokens=50, **how)
        requests = engine.add_all(PROMPTS, SAMPLINGS)
        while engine.busy:
            engine.step()
        assert [r.token_ids for r in requests] == [ids for ids, _ in expected]
        assert any(r.num_cached for r in requests) == ("paged" not in how or how["paged"])


def test_the_last_token_runs_and_only_the_same_salt_finds(monkeypatch):
    engine, ran = Engine(packed_model({**CASES["qwen3"], **LONG}, "int4")), []
    run = engine.runner.run
    monkeypatch.setattr(engine.runner, "run", lambda batch: (ran.append(batch.num_tokens), run(batch))[1])
    one = SamplingConfig(max_new_tokens=1)
    cases = [("", 64, 0), ("", 64, 32), ("", 65, 64), ("them", 65, 0), ("them", 70, 64), ("", 31, 0)]
    for salt, length, cached in cases:
        request = engine.add(SHARED[:length], one, cache_salt=salt)
        engine.step()
        assert (request.num_cached, ran.pop()) == (cached, length - cached)
    off = Engine(engine.model, prefix_caching=False)
    assert [off.generate([SHARED], one) and off.scheduler.blocks.num_idle for _ in range(2)] == [0, 0]


@torch.no_grad()
@pytest.mark.parametrize("change", ["in place", "through data", "replaced", "hook"])
def test_what_other_weights_computed_is_not_found(change):
    model = packed_model({**CASES["qwen3"], **LONG}, "plain")
    engine, greedy = Engine(model), SamplingConfig(max_new_tokens=8, temperature=0)
    before = engine.generate([SHARED], greedy)[0].token_ids
    again = engine.add(SHARED, greedy)
    engine.step()
    assert again.num_cached == 64
    linear = model.layers[0].self_attn.v_proj
    if change == "in place":
        linear.weight.mul_(-2)
    elif change == "through data":
        linear.weight.data.mul_(-2)
    elif change == "replaced":
        linear.weight = torch.nn.Parameter(linear.weight * -2)
    else:
        linear.register_forward_hook(lambda module, args, y: -2 * y)
    later = engine.add(SHARED, greedy)
    while engine.busy:
        engine.step()
    assert later.num_cached == 0
    assert later.token_ids == Engine(model).generate([SHARED], greedy)[0].token_ids != before


def test_a_cache_four_times_too_small_loses_nobody():
    model = packed_model({**CASES["qwen3"], **LONG}, "int4")
    prompts = [[b, *SHARED[: 20 + b]] for b in range(16)]
    sampling = [SamplingConfig(max_new_tokens=40, seed=b) for b in range(16)]
    expected = [Engine(model).generate([p], s)[0].token_ids for p, s in zip(prompts, sampling, strict=True)]
    needed = sum(-(-(len(p) + 39) // 32) for p in prompts)
    engine = Engine(model, cache_tokens=needed // 4 * 32, max_batch_tokens=64)
    requests = engine.add_all(prompts, sampling)
    while engine.busy:
        engine.step()
    assert [r.token_ids for r in requests] == expected and engine.scheduler.num_preemptions > 0
    assert engine.scheduler.blocks.num_used == 0


def test_a_budget_in_bytes_is_kept_to_the_byte():
    for name in ("qwen3", "latent", "gpt-oss", "dots"):
        model = packed_model({**CASES[name], **LONG}, "int4")
        engine = Engine(model, cache_bytes=5 * 32 * Engine(model).cache_bytes_per_token + 31)
        for b in range(6):
            engine.generate([[b, *SHARED[:60]]], SamplingConfig(max_new_tokens=30))
            pools = engine.memory.caches.pools
            taken = sum(buffer.nbytes for pool in pools for buffer in pool.buffers)
            assert taken == 5 * 32 * engine.cache_bytes_per_token
        assert engine.scheduler.blocks.num_blocks == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("direct", [True, False], ids=["native", "modules"])
def test_so_is_that_of_plain_models(dtype, direct, monkeypatch):
    if not direct:
        monkeypatch.setattr("manyhands.kernels.native.step.direct", lambda x: False)
    for name in CASES:
        model = packed_model({**CASES[name], **LONG}, "plain").to(dtype)
        engine = Engine(model, cache_bytes=4 * 32 * Engine(model).cache_bytes_per_token)
        engine.generate([SHARED], SAMPLINGS[0])
        taken = sum(buffer.nbytes for pool in engine.memory.caches.pools for buffer in pool.buffers)
        assert taken == 4 * 32 * engine.cache_bytes_per_token


def test_the_second_turn_of_a_long_conversation_runs_what_is_new(monkeypatch):
    engine, ran = Engine(packed_model({**CASES["qwen3"], "max_position_embeddings": 4096}, "int4")), []
    run = engine.runner.run
    monkeypatch.setattr(engine.runner, "run", lambda batch: (ran.append(batch.num_tokens), run(batch))[1])
    first = torch.randint(0, 50, (2000,), generator=torch.Generator().manual_seed(1)).tolist()
    (answer,) = engine.generate([first], SamplingConfig(max_new_tokens=20))
    ran.clear()
    question = engine.add([*first, *answer.token_ids, *range(25)], SamplingConfig(max_new_tokens=1))
    engine.step()
    assert question.num_cached == (2000 + 19) // 32 * 32 and ran == [2045 - question.num_cached] and ran[0] <= 25 + 32


def test_what_never_fits_is_said_with_its_numbers():
    model = packed_model({**CASES["qwen3"], **LONG}, "int4")
    token = Engine(model).cache_bytes_per_token
    with pytest.raises(UserError, match=rf"1,000 bytes; one block of 32 tokens takes {32 * token:,} \({token} a token"):
        Engine(model, cache_bytes=1000)
    with pytest.raises(UserError, match="cache_tokens and cache_bytes both"):
        Engine(model, cache_bytes=1 << 20, cache_tokens=64)
    with pytest.raises(UserError, match="without paged=False"):
        Engine(model, cache_bytes=1 << 20, paged=False)
    engine = Engine(model, cache_bytes=2 * 32 * token)
    with pytest.raises(UserError, match="60 tokens of prompt and up to 6 new ones need 3 blocks of 32"):
        engine.add(SHARED[:60], SAMPLINGS[0])
    assert not engine.busy and len(engine.generate([SHARED[:59]], SAMPLINGS[0])[0].token_ids) == 6


def test_an_unbounded_cache_keeps_what_one_context_needs_and_gives_back_the_rest():
    engine = Engine(packed_model(CASES["qwen3"], "int4"))  # 64 positions
    for b in range(5):
        engine.generate([[b, *SHARED[:50]]] * 2, SamplingConfig(max_new_tokens=12))
    assert engine.scheduler.blocks.num_idle == 2
    assert max(buffer.shape[0] for pool in engine.memory.caches.pools for buffer in pool.buffers) <= 8
