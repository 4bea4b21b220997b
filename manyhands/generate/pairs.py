"""What an encoder-decoder writes for a text: the text is read once, then token follows token.

    rewrite(model, tokenizer, ["Thank you <extra_id_0> me to your party."], SamplingConfig(temperature=0.0))

B = 1: each text by itself, so that its answer is its own.
"""

import re
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from manyhands.config import SamplingConfig
from manyhands.engine.answer import Completion
from manyhands.errors import UserError
from manyhands.generate.alone import Piece, pieces
from manyhands.generate.evaluate_pairs import START_ID
from manyhands.models.encoder_decoder import EncoderDecoder
from manyhands.text import Tokenizer

_SENTINEL = re.compile(r"(<extra_id_\d+>)")


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
        made = list(write(model, tokenizer, prompt, sampling or SamplingConfig()))
        said = [piece.said for piece in made if piece.said is not None]
        last = made[-1] if made else None
        found.append(
            Completion(
                "".join(piece.text for piece in made),
                [piece.token_id for piece in made],
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
    cache, ids_1S = model.new_cache(), torch.tensor([ids], device=device)

    def step(token: int | None) -> Tensor:
        next_11 = torch.tensor([[START_ID if token is None else token]], device=device)
        return model(ids_1S if token is None else None, next_11, cache=cache).logits[:, -1]

    return pieces(step, model, tokenizer, ids, sampling)
