"""A row has the same bits whoever runs beside it and however its prompt is cut, where weights are integers."""

import pytest
import torch

from manyhands.config import SamplingConfig
from manyhands.engine.batch import Batch, Row
from manyhands.engine.caches import Caches
from manyhands.engine.engine import Engine
from manyhands.engine.prefix import Prefix
from manyhands.engine.runner import Runner
from manyhands.kernels import native

from ..runtime.test_program import CASES, packed_model

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no native kernels: {native.missing()}")

EXACT = ("float32", "bf16", "plain")
"""Formats that are as stable where the engine is asked to be exact."""
MODELS = {
    "gqa": CASES["qwen3"],
    "window, sinks, biases": CASES["gpt-oss"],
    "groups, shared": CASES["dots"],
    "latent": CASES["latent"],
}
every_format = pytest.mark.parametrize("format", ["int8", "int4", "q8_0", "q4_0"])
EACH = [
    *((name, format) for name in MODELS for format in ("int8", "int4", "q8_0", "q4_0")),
    *(("groups, shared", format) for format in EXACT),
    ("latent", "plain"),
    ("window, sinks, biases", "plain"),
]
each = pytest.mark.parametrize(("name", "format"), EACH)
PROMPT, NEW = 23, 4


def runner_of(name: str, format: str) -> Runner:
    return Runner(packed_model(MODELS[name], format), exact=format in EXACT)


def text(b: int) -> list[int]:
    return torch.randint(0, 50, (PROMPT + NEW,), generator=torch.Generator().manual_seed(b)).tolist()


def alone(runner: Runner, ids: list[int], chunk: int = PROMPT) -> torch.Tensor:
    """Logits [NEW + 1, V] after the prompt, run in chunks, and after each token behind it."""
    cache, last = Caches(3).new(), PROMPT - (PROMPT - 1) % chunk - 1
    for first in range(0, last, chunk):
        runner.run(Batch([Row(ids[first : first + chunk], cache, draws=False)]))
    found = [runner.run(Batch([Row(ids[last:PROMPT], cache)])).logits]
    found += [runner.run(Batch([Row([token], cache)])).logits for token in ids[PROMPT:]]
    return torch.cat(found)


@each
def test_chunks_of_any_size(name: str, format: str) -> None:
    runner = runner_of(name, format)
    expected = alone(runner, text(0))
    for chunk in (1, 7):
        assert torch.equal(alone(runner, text(0), chunk), expected), chunk


@each
@pytest.mark.parametrize("B", [2, 40])
def test_batches_of_any_size(name: str, format: str, B: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All prompts in one step, more tokens than a program takes at once; then a token of each; some end sooner."""
    monkeypatch.setattr("manyhands.engine.runner.MOST_AT_ONCE", 256)
    runner, memory = runner_of(name, format), Caches(3)
    texts, caches = [text(b)[b % 4 :] for b in range(B)], [memory.new() for _ in range(B)]
    prompts = [Row(ids[:-NEW], cache) for ids, cache in zip(texts, caches, strict=True)]
    found = [[logits] for logits in runner.run(Batch(prompts)).logits]
    for i in range(NEW):
        going = [b for b in range(B) if b % 3 or i < 2]
        logits = runner.run(Batch([Row([texts[b][i - NEW]], caches[b]) for b in going])).logits
        for b, row in zip(going, logits, strict=True):
            found[b].append(row)
    for b in range(0, B, 1 + B // 5):
        cache = Caches(3).new()
        steps = [texts[b][:-NEW], *([token] for token in texts[b][-NEW:])]
        right = torch.cat([runner.run(Batch([Row(ids, cache)])).logits for ids in steps])
        assert torch.equal(torch.stack(found[b]), right[: len(found[b])]), b


@every_format
def test_after_preemption_and_beside_chunks_of_others(format: str) -> None:
    model = packed_model(CASES["qwen3"], format)
    sampling = SamplingConfig(max_new_tokens=17, temperature=1.0, seed=3)
    prompts = [text(b) for b in range(3)]
    expected = [Engine(model).generate([prompt], sampling)[0].token_ids for prompt in prompts]
    engine = Engine(model, cache_tokens=128, max_batch_tokens=9)
    requests = engine.add_all(prompts, sampling)
    while engine.busy:
        engine.step()
    assert [r.token_ids for r in requests] == expected and any(r.num_preemptions for r in requests)


@every_format
def test_after_what_a_conversation_kept(format: str) -> None:
    model, prefix, seen = packed_model(CASES["qwen3"], format), Prefix(), []
    engine = Engine(model)
    run = engine.runner.run
    engine.runner.run = lambda batch, states=False: (seen.append(run(batch, states)), seen[-1])[1]
    for ids in (text(0)[:9], text(0)[:20]):
        engine.add(ids, SamplingConfig(max_new_tokens=1), prefix=prefix)
        engine.step()
    whole = Runner(model).run(Batch([Row(text(0)[:20], Caches(3).new())]))
    assert torch.equal(seen[-1].logits, whole.logits)


@every_format
def test_scores_wherever_the_padding_is(format: str) -> None:
    runner = Runner(packed_model(CASES["dots"], format))
    ids, mask = torch.tensor([text(0), text(1)]), torch.ones(2, PROMPT + NEW, dtype=torch.bool)
    mask[0, :7] = mask[1, -9:] = False
    states = runner.score(ids, mask).states
    for row, real in ((0, slice(7, None)), (1, slice(0, -9))):
        assert torch.equal(states[row, real], runner.score(ids[row : row + 1, real], None).states[0])
