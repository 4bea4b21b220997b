"""`manyhands generate`: continue a prompt."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from manyhands.errors import UserError


def generate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, a run, or a name on the Hugging Face hub.")],
    prompt: Annotated[str | None, typer.Option(help="The text to continue. Default: read standard input.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, help="Only the k most probable tokens.")] = None,
    top_p: Annotated[float, typer.Option(help="Only the most probable tokens that together reach p.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Only tokens at least this probable relative to the best.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends generation. Repeatable.")] = None,
    show_routing: Annotated[
        bool, typer.Option("--show-routing", help="Print each new token with the experts that made it.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the result as JSON instead of streaming.")] = False,
) -> None:
    """Continue a prompt; the text appears as it is made.

    The prompt is plain text, behind the model's beginning-of-text token if it has one. To talk with a chat model, use
    `manyhands chat`.
    """
    from manyhands.config import parse
    from manyhands.generate.sampling import SamplingConfig

    sampling = parse(
        SamplingConfig,
        {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "seed": seed,
            "stop": tuple(stop or ()),
        },
    )
    if prompt is None:
        if sys.stdin.isatty():
            raise UserError("nothing to continue: give --prompt TEXT, or text on standard input")
        prompt = sys.stdin.read()

    from manyhands.checkpoint.model import load
    from manyhands.generate.engine import complete
    from manyhands.generate.engine import generate as steps

    model, tokenizer = load(checkpoint)
    if json_output:
        import json
        from dataclasses import asdict

        print(json.dumps({"prompt": prompt, **asdict(complete(model, tokenizer, [prompt], sampling)[0])}))
        return
    stream = steps(model, [tokenizer.encode(prompt, add_special_tokens=True)], sampling, tokenizer)
    if show_routing:
        from rich.console import Console

        from manyhands.generate.show_routing import routing_line

        console = Console(highlight=False, soft_wrap=True)
        for step in stream:
            token = step.token_ids[0]
            assert token is not None
            console.print(routing_line(tokenizer.token_bytes(token).decode("utf-8", errors="replace"), step))
        return
    print(prompt, end="", flush=True)
    for step in stream:
        print(step.texts[0], end="", flush=True)
    print()
