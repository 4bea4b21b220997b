"""How fast a model runs here: prefill and decoding, through the engine that users have.

B sequences at a time.
"""

import time
from dataclasses import dataclass
from functools import partial

import torch

from manyhands.config import SamplingConfig
from manyhands.engine.batch import Batch, Row
from manyhands.engine.caches import Caches
from manyhands.engine.runner import Runner
from manyhands.generate.steps import generate
from manyhands.models import Decoder
from manyhands.moe.bank import ExpertBank
from manyhands.plan import count_model
from manyhands.plan.count import BUFFERS, component
from manyhands.plan.here import Here
from manyhands.plan.own_files import storage_of_sizes
from manyhands.plan.recorded import RecordedSpeed, speed_of
from manyhands.plan.roof import decode_bound, prefill_bound
from manyhands.plan.sizes import sizes_of
from manyhands.plan.storage import Storage
from manyhands.runtime import prepare

_WARM_SECONDS = 1.0
_ROUND_SECONDS = 0.5  # of one row: a small model's three rounds are over before anything is settled


@dataclass(frozen=True, slots=True)
class Speed:
    """One backend on one model, one sequence; the best of some rounds, since whatever disturbs only slows down."""

    backend: str
    prefill: float
    """Tokens per second of the prompt."""
    decode: float
    """Tokens per second after it."""
    program: str
    """How a token is decoded: which parts are native, which are called as modules, and why."""
    batch: int = 1
    together: float | None = None
    """Tokens per second of `batch` sequences decoded together; None: only one was."""


def read_per_token(model: Decoder) -> int:
    """Bytes of weights that one decoded token reads: all but the input embedding, and K of E experts."""
    moe = model.config.moe
    share = moe.router.num_experts_per_tok / moe.router.num_experts if moe else 0.0
    total = 0.0
    for name, tensor in model.state_dict().items():
        if name == "embed_tokens.weight" and not model.config.tie_word_embeddings:
            continue
        total += tensor.nbytes * (share if ".experts." in name else 1.0)
    return int(total)


def warm_up(model: Decoder, backend: str, prompt: int, new: int) -> None:
    """Generate for a second: threads, clock and pages are slow at first, and whoever is measured first would pay."""
    began = time.perf_counter()
    while time.perf_counter() - began < _WARM_SECONDS:
        measure_speed(model, backend, prompt, new, rounds=1, seconds=0.0)


def measure_speed(
    model: Decoder, backend: str, prompt: int, new: int, rounds: int = 3, seconds: float | None = None
) -> Speed:
    """Time `rounds` greedy generations of `new` tokens after a random prompt, and more until `seconds` are over.

    Raises what `generate` raises.
    """
    seconds = _ROUND_SECONDS if seconds is None else seconds
    _through(model, backend)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (1, prompt), generator=generator)
    sampling = SamplingConfig(max_new_tokens=new, temperature=0.0)
    best_first = best_rest = float("inf")
    began, done = time.perf_counter(), -1  # the first warms up
    while done < rounds or time.perf_counter() - began < seconds:
        done += 1
        started = time.perf_counter()
        steps = generate(model, ids, sampling)
        next(steps)
        first = time.perf_counter()
        count = sum(1 for _ in steps)
        best_first = min(best_first, first - started)
        best_rest = min(best_rest, (time.perf_counter() - first) / max(count, 1))
    return Speed(backend, prompt / best_first, 1.0 / best_rest, repr(prepare(model)))


def measure_together(model: Decoder, backend: str, batch: int, prompt: int, new: int, rounds: int = 3) -> float:
    """Tokens per second of `batch` sequences that decode `new` tokens each, a step at a time, after random prompts.

    The best of some rounds, which go on from each other: sequences grow to prompt + rounds·new positions.
    """
    _through(model, backend)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, model.config.vocab_size, (batch, prompt), generator=generator).tolist()
    runner, memory = Runner(model), Caches(len(model.layers))
    caches = [memory.new() for _ in prompts]
    out = runner.run(Batch([Row(prompt, cache) for prompt, cache in zip(prompts, caches, strict=True)]))
    best = float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(new):
            tokens = out.logits.argmax(-1).tolist()
            out = runner.run(Batch([Row([token], cache) for token, cache in zip(tokens, caches, strict=True)]))
        best = min(best, (time.perf_counter() - started) / new)
    return batch / best


def storage_of(model: Decoder) -> Storage | None:
    """Bits per weight as the model has them in memory; None for one that has weights of no known part."""
    counts = count_model(model.config)
    sizes = dict.fromkeys(counts.by_component, 0)
    packed = False
    for name, tensor in model.state_dict().items():
        if name.endswith(BUFFERS):
            continue
        try:
            part = component(name)
        except AssertionError:
            return None
        if part in sizes:  # a tied head is no part of its own
            sizes[part] += tensor.nbytes
        packed = packed or tensor.dtype == torch.uint8
    return storage_of_sizes(sizes, counts, packed)


def speeds_of(model: Decoder, name: str, here: Here, speed: Speed, prompt: int, new: int) -> list[RecordedSpeed]:
    """What is worth remembering of a measured model: prefill, decoding, and decoding together."""
    storage = storage_of(model)
    if storage is None:
        return []
    config, machine = model.config, here.processor
    sizes, counts = sizes_of(config), count_model(config)
    told = partial(speed_of, model=name, sizes=sizes, storage=storage, threads=torch.get_num_threads())
    bits = min(32.0, max(16.0, storage.rest))
    first = prefill_bound(machine, sizes, counts, storage, prompt)
    found = [told(first, prompt / speed.prefill, work="prefill", batch=1, context=prompt)]
    for batch, rate in ((1, speed.decode), (speed.batch, speed.together)):
        if rate is not None:
            context = prompt + new / 2
            bound = decode_bound(machine, sizes, counts, storage, batch=batch, context=context, kv_bits=bits)
            found.append(told(bound, batch / rate, work="decode", batch=batch, context=context))
    return found


def _through(model: Decoder, backend: str) -> None:
    for module in model.modules():
        if isinstance(module, ExpertBank):
            module.implementation = backend
