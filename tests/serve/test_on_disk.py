"""A packed model that does not fit is served from disk: the same answers, its reads in the metrics."""

import asyncio

import pytest

from manyhands.checkpoint import budget
from manyhands.checkpoint.model import load, save
from manyhands.checkpoint.source import open_source
from manyhands.config import PackedConfig, Packing, SamplingConfig
from manyhands.engine.engine import Engine
from manyhands.kernels import native
from manyhands.quantize.quantize import quantize
from manyhands.serve import load as loading
from manyhands.serve.metrics import Metrics
from manyhands.serve.models import Models

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no native kernels: {native.missing()}")
PROMPTS = [[5, 6, 7], [9] * 20, [1], list(range(30))]
GREEDY = SamplingConfig(max_new_tokens=8, temperature=0.0, ignore_eos=True)


def test_the_same_answers_and_what_was_read(model, tokenizer, tmp_path, monkeypatch) -> None:
    save(model, tmp_path / "plain", tokenizer)
    packed = PackedConfig(experts=Packing(format="int8"), linear=Packing(format="int8"))
    quantize(open_source(tmp_path / "plain"), tmp_path / "packed", packed)
    whole, _ = load(tmp_path / "packed")
    expected = [c.token_ids for c in Engine(whole).generate(PROMPTS, GREEDY)]
    monkeypatch.setattr(loading, "resident_memory", lambda: 10**9)  # so that it does not fit whole
    monkeypatch.setattr(budget, "resident_memory", lambda: 10**8)
    (entry,) = loading.entries({"m": tmp_path / "packed"}, loading.Settings(memory=10**9))
    assert entry.num_bytes == 10**9
    models = Models([entry], 10**9)
    metrics = Metrics(models)
    models.load_first()
    served = entry.served
    store = served.service.engine.runner.store

    async def ask(prompt):
        submission = await served.service.submit(prompt, GREEDY)
        return [token.token_id async for token in submission]

    async def all_of_them():
        return await asyncio.gather(*map(ask, PROMPTS))

    try:
        assert asyncio.run(all_of_them()) == expected
        text = metrics.text().decode()
        assert f'manyhands_expert_read_bytes_total{{model_name="m",tier="disk"}} {float(store.num_bytes)}' in text
        assert served.service.counters.misses * store.slot_bytes == store.num_bytes > 0
    finally:
        models.close()
