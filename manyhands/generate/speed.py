"""How fast a model runs here: prefill and decoding, through the engine that users have.

T prompt tokens.
"""

import time
from dataclasses import dataclass

import torch

from manyhands.config import SamplingConfig
from manyhands.generate.steps import generate
from manyhands.models import Decoder
from manyhands.moe.bank import ExpertBank
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
    for module in model.modules():
        if isinstance(module, ExpertBank):
            module.implementation = backend
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
