"""A packed directory within so much memory: the same tokens, a budget that adds up, refusals that say what runs."""

import re
from dataclasses import replace

import pytest
import torch

from manyhands.checkpoint import budget
from manyhands.checkpoint.budget import FIXED, share
from manyhands.checkpoint.model import load_model, save
from manyhands.checkpoint.source import open_source
from manyhands.config import PackedConfig, Packing, SamplingConfig
from manyhands.engine.engine import Engine
from manyhands.errors import ConfigError, UserError
from manyhands.kernels.native import available, missing

from .hostile import make
from .test_packed import DOTS1, FORMATS, packed_copy

needs_native = pytest.mark.skipif(not available(), reason=f"no native kernels: {missing()}")
PROMPTS = [[5, 6, 7], [9] * 20, [1], list(range(30))]
COUNTS = [[3, 1, 2, 0, 5, 4, 9, 8]] * 8


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored")
    source = make(folder / "source", family="dots1", initializer_range=0.3, **DOTS1)
    formats = {**FORMATS, "int8": PackedConfig(experts=Packing(format="int8"))}
    return {name: packed_copy(source, folder / name, formats[name]) for name in ("int4+int8", "int8", "bf16")}


def answers(model, count=4):
    engine = Engine(model, max_sequences=count, exact=True)
    sampling = SamplingConfig(max_new_tokens=12, temperature=0.0, ignore_eos=True)
    return [c.token_ids for c in engine.generate(PROMPTS[:count], sampling)], engine


@needs_native
@pytest.mark.parametrize("format", ["int4+int8", "int8", "bf16"])
def test_the_same_tokens_from_the_least_to_plenty(packed, format, monkeypatch) -> None:
    monkeypatch.setattr(budget, "resident_memory", lambda: 10**8)  # which would grow between two loads
    directory = packed[format]
    expected, _ = answers(load_model(directory))
    with pytest.raises(UserError, match="of memory are too little; the least that runs it here is") as refused:
        load_model(directory, memory=1 << 20)
    least = int(re.search(r"is (\d+)MB", str(refused.value))[1]) * 10**6
    assert least > 10**8 + FIXED
    for memory, policy, pin in [
        (least, "lfu", None), (least + 10**6, "lru", None), (8 * 10**9, "pinned", COUNTS),
    ]:  # fmt: skip
        model = load_model(directory, memory=memory, cache_policy=policy, pin=pin and COUNTS[: _sparse(directory)])
        for count in (4, 1):
            found, engine = answers(model, count)
            assert found == expected[:count]
        assert engine.runner.store.num_bytes > 0
        b = model.budget
        assert b.baseline + b.weights + b.cache_bytes + b.scratch + b.num_slots * b.slot_bytes <= memory
        engine.runner.store.close()


def _sparse(directory):
    return len(open_source(directory).config.sparse_layers)


def test_how_memory_is_shared_out(packed) -> None:
    source = open_source(packed["int8"])
    E, K = source.config.moe.router.num_experts, source.config.moe.router.num_experts_per_tok
    least = int(re.search(r"is (\d+)MB", _refused(source, 1))[1]) * 10**6
    few = share(source, least, baseline=10**8)
    assert few.num_staged >= K and few.num_tokens >= 1 and few.memory == least
    with pytest.raises(UserError, match=f"{least // 10**6}MB"):
        share(source, least - 10**6, baseline=10**8)
    plenty = share(source, 10**10, baseline=10**8)
    assert plenty.num_staged == E and plenty.num_tokens > 100 and plenty.kept == plenty.num_experts
    assert plenty.warning() is None
    middle = share(source, 10**10, cache_bytes=1 << 20, baseline=10**8)
    assert middle.cache_bytes == 1 << 20


def test_a_small_budget_still_runs_many_tokens_at_once(packed) -> None:
    """Passes of one token would read the experts of a prompt or a batch again for each."""
    source = open_source(packed["int8"])
    plenty = share(source, 10**10, cache_bytes=1 << 20, baseline=10**8)
    least = plenty.baseline + plenty.weights + plenty.cache_bytes + plenty.scratch
    small = share(source, least + plenty.num_slots * plenty.slot_bytes, cache_bytes=1 << 20, baseline=10**8)
    assert small.num_tokens == plenty.num_tokens > 100


def _refused(source, memory):
    with pytest.raises(UserError) as refused:
        share(source, memory, baseline=10**8)
    return str(refused.value)


def test_below_one_token_a_warning_says_what_to_expect(packed) -> None:
    source = open_source(packed["int8"])
    whole = share(source, 10**10, baseline=10**8)
    cut = replace(whole, num_slots=whole.num_staged)
    assert re.search(r"memory keeps 0 of \d+ experts, and one token wants \d+: most of the .*B that", cut.warning())


@needs_native
def test_what_it_is_not_for(packed, tmp_path) -> None:
    source = make(tmp_path / "plain", family="mixtral")
    with pytest.raises(UserError, match=r"manyhands quantize .* packs them"):
        load_model(source, memory=10**10)
    for how in ({"dtype": torch.float32}, {"decode": True}):
        with pytest.raises(UserError, match="not with another device, a dtype or decode"):
            load_model(packed["int8"], memory=10**10, **how)
    with pytest.raises(ConfigError, match="no cache policy 'mru': lfu, lru or pinned"):
        load_model(packed["int8"], memory=10**10, cache_policy="mru")
    with pytest.raises(ConfigError, match="needs a trace"):
        load_model(packed["int8"], memory=10**10, cache_policy="pinned")
    model = load_model(packed["int8"], memory=10**10)
    with pytest.raises(UserError, match="cannot be trained"):
        model.train()
    with pytest.raises(UserError, match="load it without memory to save it"):
        save(model, tmp_path / "copy")
