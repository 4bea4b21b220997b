"""`manyhands generate`: continue a prompt."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from manyhands.cli.options import IgnoreField
from manyhands.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from manyhands.generate import SamplingConfig, Step
    from manyhands.moe import Routing


def generate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, a run, or a name on the Hugging Face hub.")],
    prompt: Annotated[str | None, typer.Option(help="The text to continue. Default: read standard input.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 200,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="0: greedy. Default: the model's, else 0.8.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Only the k most probable tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Only the most probable tokens that together reach p.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Only tokens this probable relative to the best.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends generation. Repeatable.")] = None,
    show_routing: Annotated[
        bool, typer.Option("--show-routing", help="Print each new token with the experts that made it.")
    ] = False,
    ignore_field: IgnoreField = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the result as JSON instead of streaming.")] = False,
) -> None:
    """Continue a prompt; the text appears as it is made.

    The prompt is plain text, behind the model's beginning-of-text token if it has one. To talk with a chat model, use
    `manyhands chat`. Sampling is the model's own (generation_config.json) where a flag does not say otherwise. Control
    characters are not printed; --json has them.
    """
    from manyhands.generate.defaults import sampling_from

    asked = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    others = {"max_new_tokens": max_new_tokens, "seed": seed, "stop": tuple(stop or ())}
    sampling_from({}, asked, **others)  # a mistake is said before a model is loaded
    if prompt is None:
        if sys.stdin.isatty():
            raise UserError("nothing to continue: give --prompt TEXT, or text on standard input")
        prompt = sys.stdin.read()

    from manyhands.checkpoint.model import load
    from manyhands.generate.engine import generate as steps
    from manyhands.terminal import clean, shown

    model, tokenizer = load(checkpoint, ignore_fields=ignore_field or ())
    sampling, line = sampling_from(tokenizer.files.generation, asked, **others)
    if line is not None:
        print(shown(line), file=sys.stderr)
    stream = steps(model, [tokenizer.encode(prompt, add_special_tokens=True)], sampling, tokenizer)
    if json_output:
        import json

        print(json.dumps(_as_dict(prompt, stream, sampling, show_routing)))
        return
    if show_routing:
        from rich.console import Console

        from manyhands.generate.show_routing import routing_line

        console = Console(highlight=False, soft_wrap=True)
        for step in stream:
            token = step.token_ids[0]
            assert token is not None
            console.print(routing_line(tokenizer.token_bytes(token).decode("utf-8", errors="replace"), step))
        return
    print(clean(prompt), end="", flush=True)
    for step in stream:
        print(clean(step.texts[0]), end="", flush=True)
    print()


def _as_dict(
    prompt: str, stream: "Iterator[Step]", sampling: "SamplingConfig", show_routing: bool
) -> dict[str, object]:
    """What was made, how, and for each token and sparse layer the experts that made it, first choice first."""
    texts: list[str] = []
    ids: list[int] = []
    reason, routing = None, []
    for step in stream:
        assert step.token_ids[0] is not None
        ids.append(step.token_ids[0])
        texts.append(step.texts[0])
        reason = step.finish_reasons[0]
        if show_routing:
            routing.append({str(layer): _experts(found) for layer, found in step.routings.items()})
    made = {"prompt": prompt, "text": "".join(texts), "token_ids": ids, "finish_reason": reason}
    return {**made, "sampling": sampling.model_dump(mode="json"), **({"routing": routing} if show_routing else {})}


def _experts(routing: "Routing") -> dict[str, list[float]]:
    chosen = routing.expert_ids[0] >= 0
    return {
        "experts": routing.expert_ids[0][chosen].tolist(),
        "weights": routing.weights[0][chosen].tolist(),
    }
