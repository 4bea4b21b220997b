"""How tokens are chosen and when a text ends. What the fields do to logits is in `engine/sampling.py`."""

from typing import Annotated

from pydantic import Field

from manyhands.config.base import Strict
from manyhands.defaults import TEMPERATURE

MOST_LOGPROBS = 20
"""Alternatives that may be asked for with a token."""
TokenId = Annotated[int, Field(ge=0, lt=1 << 32)]
StopString = Annotated[str, Field(min_length=1, max_length=1024)]


class SamplingConfig(Strict):
    """How tokens are chosen and when to stop. The defaults are those of `manyhands generate` and `chat`: a temperature,
    no filter. A temperature of 1 samples from the model's own distribution."""

    temperature: Annotated[float, Field(ge=0.0, le=1e6)] = TEMPERATURE
    """The logits are divided by it. 0 is greedy: the most probable token, ties to the lower id."""
    top_k: Annotated[int, Field(ge=1)] | None = None
    """Only the k most probable tokens, and those equal to the k-th."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Only the most probable tokens that together reach this (arXiv 1904.09751); the one that crosses it stays."""
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Only tokens at least this probable relative to the most probable one (arXiv 2407.01082)."""
    repetition_penalty: Annotated[float, Field(gt=0.0, le=1e3)] = 1.0
    """Logits of tokens in the prompt or the answer are divided by it where positive, else multiplied
    (arXiv 1909.05858)."""
    presence_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] = 0.0
    """Subtracted from the logits of tokens that the answer has."""
    frequency_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] = 0.0
    """Subtracted from a token's logit once for each time that the answer has it."""
    logit_bias: Annotated[
        tuple[tuple[TokenId, Annotated[float, Field(ge=-100, le=100)]], ...], Field(max_length=4096)
    ] = ()
    """(token, what is added to its logit); −100 forbids in practice, 100 forces."""
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] = 0
    """The same seed, prompt and model give the same text, whatever else the engine is doing."""
    choice: Annotated[int, Field(ge=0, lt=1 << 31)] = 0
    """Which of several answers to one prompt with one seed: each draws differently."""
    max_new_tokens: Annotated[int, Field(ge=0, le=1 << 24)] = 256
    """0 makes no token: for `prompt_logprobs`."""
    min_new_tokens: Annotated[int, Field(ge=0, le=1 << 24)] = 0
    """Before so many no token that would end the answer is drawn."""
    ignore_eos: bool = False
    """The model's own end tokens do not end it, and are text like others."""
    stop_token_ids: Annotated[tuple[TokenId, ...], Field(max_length=1024)] = ()
    """Tokens that end generation, beside the model's own, and are not shown."""
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    """With each new token its log-probability, and this many of the most probable ones; by the model alone, before
    anything above. None: none."""
    prompt_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    """The same for the tokens of the prompt, but its first."""
    stop: Annotated[tuple[StopString, ...], Field(max_length=16)] = ()
    """Text that ends generation and is not itself shown."""
