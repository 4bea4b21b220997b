"""Prompts in, one new token per prompt and step out: the engine for callers who want all their prompts in step.

B prompts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from manyhands.checkpoint.model import LoadedModel, only_decoder
from manyhands.config import SamplingConfig
from manyhands.engine.answer import Completion, Token
from manyhands.engine.engine import Engine, Prompt, check_errors
from manyhands.engine.prefix import Prefix
from manyhands.engine.request import FinishReason, Request
from manyhands.models import Decoder
from manyhands.moe import Routing
from manyhands.text import Tokenizer


@dataclass(frozen=True, slots=True)
class Step:
    """One new token for each of the B prompts."""

    token_ids: list[int | None]
    """None for one that had ended before."""
    texts: list[str]
    """The text that became certain with this token, never half a character. Empty without a tokenizer."""
    finish_reasons: list[FinishReason | None]
    """Why it ended, in the step in which it did."""
    tokens: list[Token | None] = field(default_factory=list, repr=False)
    """The same, as the engine gives it."""

    @property
    def routings(self) -> list[dict[int, Routing]]:
        """Per prompt and sparse layer, T = 1: the routing of the pass its token was drawn from; {} if it had ended."""
        return [{} if token is None else token.routings for token in self.tokens]


def generate(
    model: Decoder,
    prompts: Tensor | Sequence[Sequence[int]],
    sampling: SamplingConfig | Sequence[SamplingConfig],
    tokenizer: Tokenizer | None = None,
    prefix: Prefix | None = None,
) -> Iterator[Step]:
    """Continue B prompts, token ids [B, S] or lists of different lengths, until each has ended.

    Computes in the dtype of the weights. An empty prompt starts from the end-of-text token, which stands between
    documents. A sequence ends at any of `tokenizer.eos_token_ids`; without a `tokenizer` there is neither text nor a
    token to end at. `sampling` is one for all, or each its own; a prompt's tokens are what they are alone. With a
    `prefix`, for one prompt, what an earlier call with it has computed is not computed again, and what this one
    computes is kept in it; the tokens are the same, up to rounding. The model's training mode is put back after every
    step; the steps' tensors are inference tensors, to be read only.

    Raises `UserError`, on the call, for a model that cannot generate and for prompts that are not in the vocabulary
    or leave no room in the context; `ManyhandsError`, in a step, if the logits are not finite.
    """
    rows = prompts.tolist() if isinstance(prompts, Tensor) else prompts
    assert prefix is None or len(rows) == 1
    # in step: nobody waits for what another is about to compute
    engine = Engine(model, tokenizer, max_sequences=max(1, len(rows)), prefix_caching=False)
    return in_step(engine, rows, sampling, prefix)


def in_step(
    engine: Engine,
    prompts: Sequence[Prompt],
    sampling: SamplingConfig | Sequence[SamplingConfig],
    prefix: Prefix | None = None,
) -> Iterator[Step]:
    """`generate` with an engine that is the caller's alone and stays: what it was still doing ends.

    Closing the iterator ends what has not ended.
    """
    for request in (*engine.scheduler.running, *engine.scheduler.waiting):
        engine.abort(request)
    return _steps(engine, engine.add_all(prompts, sampling, prefix=prefix))


def complete(
    model: Decoder | LoadedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    sampling: SamplingConfig | Sequence[SamplingConfig] | None = None,
    *,
    exact: bool = False,
) -> list[Completion]:
    """Continue texts, all at once, each from the model's beginning-of-text token if it has one.

    The completions are in the prompts' order. `sampling` is one for all, or each its own; None: `SamplingConfig()`.
    `exact`: a prompt's logits are the same bits in any batch, as those of int8 and int4 models always are. For
    requests that come and go, tokens as they are made, or routing: `Engine`. Raises what `generate` does, and
    `ConfigError` for a model that is no decoder.
    """
    model = model if isinstance(model, Decoder) else only_decoder(model, "mh.generate")
    return Engine(model, tokenizer, max_sequences=max(1, len(prompts)), exact=exact).generate(prompts, sampling)


def _steps(engine: Engine, requests: list[Request]) -> Iterator[Step]:
    try:
        while engine.busy:
            tokens: list[Token | None] = [None] * len(requests)
            for token in engine.step():
                tokens[requests.index(token.request)] = token
            check_errors(requests)
            yield Step(
                [None if t is None else t.token_id for t in tokens],
                ["" if t is None else t.text for t in tokens],
                [None if t is None else t.finish_reason for t in tokens],
                tokens,
            )
    finally:
        for request in requests:
            engine.abort(request)
