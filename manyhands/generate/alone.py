"""One text at a time, token by token: for models whose state the engine does not hold.

    continued(model, tokenizer, "The hands are", SamplingConfig(temperature=0.0))

V vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from manyhands.config import SamplingConfig
from manyhands.engine.adjust import Adjuster
from manyhands.engine.draw import TokenLogprob, Wish, draw_all
from manyhands.engine.request import FinishReason
from manyhands.engine.stream import TextStream
from manyhands.errors import ManyhandsError, UserError
from manyhands.models import Recurrent
from manyhands.text import Tokenizer


@dataclass(frozen=True, slots=True)
class Piece:
    """One new token."""

    token_id: int
    text: str
    """What became certain with it, never half a character."""
    finish_reason: FinishReason | None
    """Why the text ended with it, or None."""
    stop_reason: str | int | None
    said: TokenLogprob | None


def continued(model: Recurrent, tokenizer: Tokenizer, prompt: str, sampling: SamplingConfig) -> Iterator[Piece]:
    """Token by token how the model goes on from `prompt`, until its end of text, a stop string or `max_new_tokens`.

    The model's beginning-of-text token, if it has one, stands in front; an empty prompt starts from the end-of-text
    token. Raises `UserError`, on the call, for `prompt_logprobs` and for a router that looks at other tokens;
    `ManyhandsError`, on the way, if the logits are not finite.
    """
    moe = model.config.moe
    if moe is not None and not moe.router.causal_safe:
        raise UserError("this model cannot generate: its router looks at other tokens than the one it routes")
    if sampling.prompt_logprobs is not None:
        raise UserError("prompt_logprobs: of a recurrent model only the new tokens have them")
    ids = [*tokenizer.front_ids, *tokenizer.encode(prompt)]
    if not ids:
        if tokenizer.eos_token_id is None:
            raise UserError("the prompt is empty, and there is no end-of-text token to start from; give some text")
        ids = [tokenizer.eos_token_id]
    if max(ids) >= model.config.vocab_size:
        raise UserError(f"the prompt holds token id {max(ids)}; vocab_size = {model.config.vocab_size}")
    cache, device = model.new_cache(), model.embed_tokens.weight.device

    def step(token: int | None) -> Tensor:
        new = ids if token is None else [token]
        return model(torch.tensor([new], device=device), cache=cache).logits[:, -1]

    return pieces(step, model, tokenizer, ids, sampling)


def pieces(
    step: Callable[[int | None], Tensor],
    model: nn.Module,
    tokenizer: Tokenizer,
    ids: list[int],
    sampling: SamplingConfig,
) -> Iterator[Piece]:
    """What is drawn from `step(last token)`, logits [1, V]; None where there is none yet. `ids` are what was read."""
    ends = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else tokenizer.eos_token_ids)
    adjuster = Adjuster(sampling, ids, ends, None)
    stream = TextStream(tokenizer.stream_decoder(), sampling.stop)
    token: int | None = None
    for made in range(1, sampling.max_new_tokens + 1):
        was_training = model.training
        model.eval()
        try:
            with torch.inference_mode():
                logits_1V = step(token)
        finally:
            model.train(was_training)
        [drawn] = draw_all(logits_1V, [Wish(sampling, len(ids) + made, adjuster)])
        if drawn.error is not None:
            raise ManyhandsError(drawn.error)
        token = drawn.token_id
        adjuster.push(token)
        ended = token in ends
        text = "" if ended else stream.push(token)
        reason: FinishReason | None = "stop" if ended or stream.stopped else None
        if reason is None and made == sampling.max_new_tokens:
            reason = "length"
        if reason is not None:
            text += stream.finish()
        stopped_by = token if ended and token in sampling.stop_token_ids else stream.found
        yield Piece(token, text, reason, stopped_by, drawn.logprob)
        if reason is not None:
            return
