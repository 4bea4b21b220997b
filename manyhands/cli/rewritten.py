"""What `generate` prints for an encoder-decoder: not the prompt continued, but what it writes for it."""

import json

from manyhands.checkpoint.model import EncoderDecoderModel
from manyhands.config import SamplingConfig
from manyhands.errors import UserError
from manyhands.generate.pairs import filled, rewrite, write
from manyhands.terminal import clean
from manyhands.text import Tokenizer


def refuse(flags: dict[str, bool], kind: str = "an encoder-decoder") -> None:
    """Raises `UserError` naming a flag that was given and is for decoders only."""
    for flag, given in flags.items():
        if given:
            raise UserError(f"{flag} is for decoders, and this model is {kind}: leave it out")


def show_rewritten(
    model: EncoderDecoderModel, tokenizer: Tokenizer, prompts: list[str], sampling: SamplingConfig, json_output: bool
) -> None:
    """One answer after the other, each on lines of its own, as it is made; or all of them as JSON."""
    if json_output:
        how = sampling.model_dump(mode="json")
        made = [
            {
                "prompt": prompt,
                "text": found.text,
                "filled": filled(prompt, found.text),
                "token_ids": found.token_ids,
                "finish_reason": found.finish_reason,
                "sampling": how,
            }
            for prompt, found in zip(prompts, rewrite(model, tokenizer, prompts, sampling), strict=True)
        ]
        print(json.dumps(made if len(made) > 1 else made[0]))
        return
    for number, prompt in enumerate(prompts):
        pieces = write(model, tokenizer, prompt, sampling)
        print(end="\n" if number else "")
        for piece in pieces:
            print(clean(piece.text), end="", flush=True)
        print()
