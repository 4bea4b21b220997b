"""Small packed models with random weights that decode many sequences at once, and what a step of theirs reads.

B sequences.
"""

import statistics
from dataclasses import dataclass
from pathlib import Path

import torch

from manyhands.checkpoint.find import open_checkpoint
from manyhands.checkpoint.model import Model, load_model, save
from manyhands.config import ModelConfig, PackedConfig, Packing
from manyhands.engine.batch import Batch, Row
from manyhands.engine.caches import Caches
from manyhands.engine.runner import Runner
from manyhands.lab.experiment import Arm
from manyhands.lab.job import Job
from manyhands.models import Decoder
from manyhands.plan.compute import forward_flops
from manyhands.plan.count import count_model
from manyhands.plan.sizes import sizes_of
from manyhands.quantize.quantize import quantize

_PROMPT = 16
_WARM = 2


def model_config(E: int, K: int, *, F: int | None = None, quick: bool) -> ModelConfig:
    """Four layers as wide as a small laptop model's, two narrow ones if `quick`; E 0: dense networks of width F."""
    D, L = (64, 2) if quick else (512, 4)
    F = F or D
    router = {"num_experts": E, "num_experts_per_tok": K}
    return ModelConfig(
        vocab_size=256 if quick else 4096,
        hidden_size=D,
        num_hidden_layers=L,
        intermediate_size=F,
        max_position_embeddings=1024,
        attention={"num_attention_heads": D // 64, "head_dim": 64},  # type: ignore[arg-type]
        moe={"router": router, "moe_intermediate_size": F} if E else None,  # type: ignore[arg-type]
    )


def packed_model(config: ModelConfig, directory: Path, seed: int) -> Model:
    """A decoder with fresh weights in int8, on the kernels that users have."""
    torch.manual_seed(seed)
    plain, target = (directory / f"{name}-{len(list(directory.iterdir()))}" for name in ("plain", "int8"))
    save(Decoder(config), plain, family="manyhands")
    model = load_model(pack(plain, target))
    assert isinstance(model, Model)
    return model


def pack(source: Path, target: Path) -> Path:
    """A copy of a checkpoint, or of a run's newest, in int8."""
    int8 = Packing(format="int8")
    quantize(open_checkpoint(source), target, PackedConfig(experts=int8, linear=int8), measure=False)
    return target


@dataclass(frozen=True, slots=True)
class Steps:
    """Decoding of B sequences in step."""

    seconds: float
    """Of the median step."""
    distinct: float
    """Experts that a step touches, mean over layers and steps; 0 without experts."""


def decode(model: Decoder, B: int, steps: int, job: Job) -> Steps:
    """Steps over random tokens: what random weights would write soon repeats itself."""
    drawn = torch.Generator().manual_seed(B)
    vocabulary = model.config.vocab_size
    prompts = torch.randint(vocabulary, (B, _PROMPT), generator=drawn).tolist()
    runner, memory = Runner(model), Caches(len(model.layers))
    caches = [memory.new() for _ in prompts]
    runner.run(Batch([Row(prompt, cache) for prompt, cache in zip(prompts, caches, strict=True)]))
    times, distinct = [], []
    for _ in range(steps + _WARM):
        tokens = torch.randint(vocabulary, (B,), generator=drawn).tolist()
        with job.clock() as clock:
            out = runner.run(Batch([Row([token], cache) for token, cache in zip(tokens, caches, strict=True)]))
        times.append(clock.seconds)
        distinct += [len(set(routing.expert_ids.flatten().tolist())) for routing in out.routed.layers.values()]
    return Steps(statistics.median(times[_WARM:]), statistics.mean(distinct) if distinct else 0.0)


def arm(name: str, config: ModelConfig, note: str = "") -> Arm:
    """Its parameters, those that multiply a token, and the FLOPs of a token."""
    counts = count_model(config)
    flops = forward_flops(sizes_of(config), counts, _PROMPT)
    return Arm(name, counts.total, counts.active_without_embedding, flops, note)
