"""Random models of usual layer sizes, to learn how fast a machine runs them: `manyhands doctor --speeds`.

D width, E experts, K experts per token, F expert width, L layers. The layers are as wide as those of models that people
run on processors, since what is lost a layer does not grow with it; there are few, since all layers cost alike.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from manyhands.checkpoint.model import load_model, only_decoder
from manyhands.checkpoint.random_packed import write_random_packed
from manyhands.config import AttentionConfig, ModelConfig, MoEConfig, PackedConfig, Packing, RouterConfig
from manyhands.generate.speed import measure_speed, measure_together, speeds_of, warm_up
from manyhands.models import Decoder, init_weights
from manyhands.plan import count_model
from manyhands.plan.here import Here
from manyhands.plan.recorded import RecordedSpeed

FORMATS = ("float32", "bf16", "int8", "int4")
"""The first two as plain tensors, the others packed as `quantize` does, linear layers too."""
BATCH = 16
PROMPT, NEW = 128, 24
VOCABULARY = 2048
"""Small, so that layers are most of a step."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Of one model."""

    D: int
    E: int
    K: int
    F: int
    L: int

    @property
    def name(self) -> str:
        """For records and people."""
        return f"typical, width {self.D}, {self.K} of {self.E} experts of {self.F}, {self.L} layers"

    @property
    def config(self) -> ModelConfig:
        """Heads of 128, and as many keys."""
        return ModelConfig(
            vocab_size=VOCABULARY,
            hidden_size=self.D,
            num_hidden_layers=self.L,
            max_position_embeddings=1024,
            attention=AttentionConfig(num_attention_heads=self.D // 128, head_dim=128),
            moe=MoEConfig(
                router=RouterConfig(num_experts=self.E, num_experts_per_tok=self.K), moe_intermediate_size=self.F
            ),
        )


SHAPES = (
    Shape(D=1024, E=32, K=4, F=512, L=3),
    Shape(D=1024, E=64, K=8, F=512, L=2),
    Shape(D=1536, E=64, K=8, F=512, L=2),
    Shape(D=2048, E=32, K=4, F=768, L=2),
    Shape(D=2048, E=40, K=4, F=1408, L=1),
)
"""An eighth or so of the experts work for a token, as in most models now: so an expert has few rows of a batch."""


def typical_speeds(
    here: Here, memory: float, shapes: tuple[Shape, ...] = SHAPES, formats: tuple[str, ...] = FORMATS
) -> Iterator[tuple[str, list[RecordedSpeed]]]:
    """(format, speeds) of every model in every format that takes at most a third of `memory` bytes."""
    for shape in shapes:
        for format in formats:
            if 4 * count_model(shape.config).total <= memory / 3:
                yield format, speeds_in(shape.config, shape.name, format, here)


def speeds_in(
    config: ModelConfig, name: str, format: str, here: Here, prompt: int = PROMPT, new: int = NEW
) -> list[RecordedSpeed]:
    """Prefill, decoding, and `BATCH` sequences decoding together, of a random model in one format."""
    with tempfile.TemporaryDirectory() as directory:
        model = random_model(config, format, Path(directory) / "model")
        warm_up(model, "auto", prompt, new)
        speed = measure_speed(model, "auto", prompt, new)
        speed = replace(speed, batch=BATCH, together=measure_together(model, "auto", BATCH, prompt // 2, new // 3))
        return speeds_of(model, name, here, speed, prompt, new)


def random_model(config: ModelConfig, format: str, directory: Path) -> Decoder:
    """In one of `FORMATS`; a packed one is written at `directory` and mapped."""
    if format in ("float32", "bf16"):
        model = Decoder(config).eval()
        init_weights(model, seed=0)
        return model if format == "float32" else model.to(torch.bfloat16)
    packing = Packing(format="int4", group_size=32) if format == "int4" else Packing(format="int8")
    write_random_packed(directory, config, PackedConfig(experts=packing, linear=packing))
    return only_decoder(load_model(directory), "a random model")
