"""What an encoder-decoder writes for a text: the text is read once, then token follows token.

    rewrite(model, tokenizer, ["Thank you <extra_id_0> me to your party."], SamplingConfig(temperature=0.0))

B = 1: each text by itself, so that its answer is its own.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from manyhands.config import SamplingConfig
from manyhands.engine.adjust import Adjuster
from manyhands.engine.answer import Completion
from manyhands.engine.draw import TokenLogprob, Wish, draw_all
from manyhands.engine.request import FinishReason
from manyhands.engine.stream import TextStream
from manyhands.errors import ManyhandsError, UserError
from manyhands.generate.evaluate_pairs import START_ID
from manyhands.models.encoder_decoder import EncoderDecoder
from manyhands.text import Tokenizer

_SENTINEL = re.compile(r"(<extra_id_\d+>)")


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


def write(model: EncoderDecoder, tokenizer: Tokenizer, prompt: str, sampling: SamplingConfig) -> Iterator[Piece]:
    """Token by token what the model writes for `prompt`, until its end of text, a stop string or `max_new_tokens`.

    Names of special tokens in the prompt are those tokens: `<extra_id_0>` asks for what stood there. The end of text is
    put behind it. A capacity counts each step by itself, as transformers does: what a full expert drops in training it
    may keep here.

    Raises `UserError`, on the call, for an empty prompt, `prompt_logprobs`, and a router whose experts choose their
    tokens; `ManyhandsError`, on the way, if the logits are not finite.
    """
    router = model.config.router
    if router is not None and router.select == "expert_choice":
        raise UserError("this model cannot generate: its experts choose tokens (select = 'expert_choice')")
    if sampling.prompt_logprobs is not None:
        raise UserError("prompt_logprobs: an encoder-decoder reads its prompt, and predicts none of it")
    ids = tokenizer.encode(prompt, parse_special=True)
    if not ids:
        raise UserError("the prompt is empty: an encoder-decoder writes about what it reads; give some text")
    if max(ids) >= model.config.vocab_size:
        raise UserError(f"the prompt holds token id {max(ids)}; vocab_size = {model.config.vocab_size}")
    return _pieces(model, tokenizer, [*ids, *_end(tokenizer)], sampling)


def rewrite(
    model: EncoderDecoder, tokenizer: Tokenizer, prompts: Sequence[str], sampling: SamplingConfig | None = None
) -> list[Completion]:
    """All of what `write` gives, for each prompt. `sampling` None: `SamplingConfig()`."""
    found = []
    for prompt in prompts:
        pieces = list(write(model, tokenizer, prompt, sampling or SamplingConfig()))
        said = [piece.said for piece in pieces if piece.said is not None]
        last = pieces[-1] if pieces else None
        found.append(
            Completion(
                "".join(piece.text for piece in pieces),
                [piece.token_id for piece in pieces],
                last.finish_reason if last else "length",
                stop_reason=last.stop_reason if last else None,
                logprobs=said or None,
            )
        )
    return found


def filled(prompt: str, written: str) -> str | None:
    """`prompt` with what was written for each of its sentinels in their place; None if it has none.

    A sentinel that nothing was written for stays.
    """
    parts = _SENTINEL.split(written)
    spans = dict(reversed([*zip(parts[1::2], parts[2::2], strict=True)]))  # of one that comes twice the first counts
    return _SENTINEL.sub(lambda found: spans.get(found[0], found[0]), prompt) if _SENTINEL.search(prompt) else None


def _end(tokenizer: Tokenizer) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _pieces(model: EncoderDecoder, tokenizer: Tokenizer, ids: list[int], sampling: SamplingConfig) -> Iterator[Piece]:
    device = model.embed_tokens.weight.device
    ends = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else tokenizer.eos_token_ids)
    adjuster = Adjuster(sampling, ids, ends, None)
    stream = TextStream(tokenizer.stream_decoder(), sampling.stop)
    cache, ids_1S = model.new_cache(), torch.tensor([ids], device=device)
    token = START_ID
    for made in range(1, sampling.max_new_tokens + 1):
        was_training = model.training
        model.eval()
        try:
            with torch.inference_mode():
                next_11 = torch.tensor([[token]], device=device)
                logits_1V = model(ids_1S if made == 1 else None, next_11, cache=cache).logits[:, -1]
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
