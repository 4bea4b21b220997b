"""How tokens are chosen and when a text ends. What the fields do to logits is in `engine/sampling.py`."""

from typing import Annotated

from pydantic import Field

from manyhands.config.base import Strict

StopString = Annotated[str, Field(min_length=1, max_length=1024)]


class SamplingConfig(Strict):
    """How tokens are chosen and when to stop. The defaults sample from the model's own distribution."""

    temperature: Annotated[float, Field(ge=0.0, le=1e6)] = 1.0
    """The logits are divided by it. 0 is greedy: the most probable token, ties to the lower id."""
    top_k: Annotated[int, Field(ge=1)] | None = None
    """Only the k most probable tokens, and those equal to the k-th."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Only the most probable tokens that together reach this (arXiv 1904.09751); the one that crosses it stays."""
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Only tokens at least this probable relative to the most probable one (arXiv 2407.01082)."""
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    """The same seed, prompt and model give the same text, whatever else the engine is doing."""
    max_new_tokens: Annotated[int, Field(ge=1, le=1 << 24)] = 256
    stop: Annotated[tuple[StopString, ...], Field(max_length=16)] = ()
    """Text that ends generation and is not itself shown."""
