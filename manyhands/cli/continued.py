"""What `generate` prints for a recurrent model: each prompt continued by itself, one after the other."""

import json

from manyhands.checkpoint.model import RecurrentModel
from manyhands.config import SamplingConfig
from manyhands.generate.alone import continued
from manyhands.terminal import clean
from manyhands.text import Tokenizer


def show_continued(
    model: RecurrentModel, tokenizer: Tokenizer, prompts: list[str], sampling: SamplingConfig, json_output: bool
) -> None:
    """The prompt and what follows, as it is made; or all of them as JSON."""
    made: list[dict[str, object]] = []
    for number, prompt in enumerate(prompts):
        stream = continued(model, tokenizer, prompt, sampling)
        if json_output:
            pieces = list(stream)
            made.append(
                {
                    "prompt": prompt,
                    "text": "".join(piece.text for piece in pieces),
                    "token_ids": [piece.token_id for piece in pieces],
                    "finish_reason": pieces[-1].finish_reason if pieces else "length",
                    "sampling": sampling.model_dump(mode="json"),
                }
            )
            continue
        print("\n" if number else "", clean(prompt), sep="", end="", flush=True)
        for piece in stream:
            print(clean(piece.text), end="", flush=True)
        print()
    if json_output:
        print(json.dumps(made if len(made) > 1 else made[0]))
