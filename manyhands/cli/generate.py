"""`manyhands generate`: continue a prompt."""

import sys
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from manyhands.cli.crew import with_crew
from manyhands.cli.loudness import LOG
from manyhands.cli.options import (
    TRACE_LIMIT,
    Adapter,
    CachePolicy,
    IgnoreField,
    Memory,
    Pin,
    TraceDirectory,
    TraceLimit,
    Which,
    on_disk,
)
from manyhands.cli.progress import Loading
from manyhands.cli.recorded import check_trace, recording
from manyhands.cli.size import size
from manyhands.defaults import TEMPERATURE
from manyhands.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.text import Text

    from manyhands.config import SamplingConfig
    from manyhands.engine.answer import Token
    from manyhands.moe import Routing
    from manyhands.moe.crew import Crew
    from manyhands.text import Tokenizer

Shown = TypeVar("Shown")


def generate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, a run, a GGUF file, or a name on the hub.")],
    prompt: Annotated[
        list[str] | None, typer.Option(help="The text to continue; -: standard input, the default. Repeatable.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 200,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help=f"0: greedy. Default: the model's, else {TEMPERATURE}.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Only the k most probable tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Only the most probable tokens that together reach p.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Only tokens this probable relative to the best.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends generation. Repeatable.")] = None,
    show_routing: Annotated[
        bool, typer.Option("--show-routing", help="Print each new token with the experts that made it.")
    ] = False,
    without_expert: Annotated[
        list[str] | None,
        typer.Option(
            "--without-expert",
            metavar="L.E",
            help="Also answer as if expert E of layer L were off and show both. Repeatable.",
        ),
    ] = None,
    replay: Annotated[
        Path | None,
        typer.Option(
            "--replay",
            metavar="TRACE",
            help="In place of prompts: the texts of a recorded trace, each by its own routing and by the recorded one.",
        ),
    ] = None,
    exact: Annotated[
        bool,
        typer.Option(
            "--exact", help="The same logits in any batch, bit for bit, of float weights too (int8, int4: always)."
        ),
    ] = False,
    speculate: Annotated[
        int,
        typer.Option(
            min=0, max=64, help="Guess up to so many tokens ahead from what stood before; the text stays the same."
        ),
    ] = 0,
    trace: TraceDirectory = None,
    trace_limit: TraceLimit = TRACE_LIMIT,
    memory: Memory = None,
    cache_policy: CachePolicy = None,
    pin: Pin = None,
    which: Which = None,
    adapter: Adapter = None,
    ignore_field: IgnoreField = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the result as JSON instead of streaming.")] = False,
) -> None:
    """Continue a prompt; the text appears as it is made.

    The prompt is plain text, behind the model's beginning-of-text token if it has one. To talk with a chat model, use
    `manyhands chat`. Several prompts are continued together, each as it would be alone, and printed one after the
    other; with --json as a list. Sampling is the model's own (generation_config.json) where a flag does not say
    otherwise. Control characters are not printed; --json has them. A line break that ends standard input is left out.

    On N processes, which share out the experts: torchrun --nproc-per-node N -m manyhands generate …

    An encoder-decoder (T5, Switch) does not continue the prompt: what it writes for it is printed. One trained on spans
    writes what stood where the prompt has <extra_id_0>, <extra_id_1>, …
    """
    from manyhands.checkpoint.runs import checkpoint_of
    from manyhands.generate.defaults import sampling_from
    from manyhands.parallel.started import alike

    asked = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    others = {"max_new_tokens": max_new_tokens, "seed": seed, "stop": tuple(stop or ())}
    with alike():
        path = checkpoint_of(checkpoint, which)
        sampling_from({}, asked, **others)  # a mistake is said before a model is loaded
        limit = size("--trace-limit", trace_limit)
        check_trace(trace)
        stay = on_disk(memory, cache_policy, pin)
        flags = {"--show-routing": show_routing, "--trace": trace is not None}
        without = _check_edits(without_expert or [], replay, flags)
        if replay is not None and prompt:
            raise UserError("--replay brings its own texts: leave --prompt out")
        if (prompt or []).count("-") > 1:
            raise UserError("--prompt -: standard input is read once, give it once")
        if not prompt and replay is None and sys.stdin.isatty():
            raise UserError("nothing to continue: give --prompt TEXT, or text on standard input")

    def answer(crew: "Crew | None") -> None:
        from manyhands.checkpoint.model import EncoderDecoderModel, RecurrentModel, load, only_decoder
        from manyhands.engine.engine import Engine

        asked_for = prompt or ([] if replay is not None else ["-"])
        prompts = [_standard_input() if text == "-" else text for text in asked_for]
        if prompts == [""] and "" not in (prompt or []):
            raise UserError("nothing to continue: standard input is empty; --prompt '' is a text without a beginning")
        with Loading(path) as read:
            loaded, tokenizer = load(path, ignore_fields=ignore_field or (), adapter=adapter, **stay, crew=crew)
        sampling, line = sampling_from(tokenizer.files.generation, asked, **others)
        if line is not None:
            LOG.info("%s", line)
        only = {"--replay": replay is not None, "--without-expert": bool(without), "--show-routing": show_routing}
        only |= {"--exact": exact, "--speculate": bool(speculate), "--trace": trace is not None}
        if isinstance(loaded, EncoderDecoderModel):
            from manyhands.cli.rewritten import refuse, show_rewritten

            refuse(only)
            read.said(loaded)
            show_rewritten(loaded, tokenizer, prompts, sampling, json_output)
            return
        if isinstance(loaded, RecurrentModel):
            from manyhands.cli.continued import show_continued
            from manyhands.cli.rewritten import refuse

            refuse(only, "a recurrent one")
            read.said(loaded)
            show_continued(loaded, tokenizer, prompts, sampling, json_output)
            return
        model = only_decoder(loaded, "generate")
        read.said(model)
        if without or replay is not None:
            from manyhands.cli.edited import show_edited

            engine = Engine(model, tokenizer, exact=exact, speculate=speculate)
            show_edited(engine, tokenizer, prompts, sampling, without, replay, json_output)
            return
        with recording(model, tokenizer, trace, limit, "generate") as recorder:
            engine = Engine(
                model, tokenizer, max_sequences=len(prompts), exact=exact, speculate=speculate, trace=recorder
            )
            _say(prompts, _timed(engine.stream(prompts, sampling)), tokenizer, sampling, show_routing, json_output)

    with_crew(answer)


def _timed(stream: "Iterator[tuple[int, Token]]") -> "Iterator[tuple[int, Token]]":
    """The same; at its end, with -v, how fast it came."""
    began, first, number = time.monotonic(), 0.0, 0
    for found in stream:
        first, number = first or time.monotonic(), number + 1
        yield found
    if number > 1:
        from manyhands.format import show

        rate = (number - 1) / max(time.monotonic() - first, 1e-9)
        LOG.debug("the first token after %s, then %s", show(first - began, "s"), show(rate, "tok/s"))


def _standard_input() -> str:
    """`echo hi |` means hi: one line break at the end belongs to the shell."""
    return sys.stdin.read().removesuffix("\n")


def _say(
    prompt: list[str],
    stream: "Iterator[tuple[int, Token]]",
    tokenizer: "Tokenizer",
    sampling: "SamplingConfig",
    show_routing: bool,
    json_output: bool,
) -> None:
    from manyhands.terminal import clean

    if json_output:
        import json

        made = _as_dicts(prompt, stream, sampling, show_routing)
        print(json.dumps(made if len(made) > 1 else made[0]))
        return
    if show_routing:
        from rich.console import Console

        from manyhands.generate.show_routing import routing_line

        console = Console(highlight=False, soft_wrap=True)

        def with_experts(token: "Token") -> "Text":
            text = tokenizer.token_bytes(token.token_id).decode("utf-8", errors="replace")
            return routing_line(text, token.routings)

        for number, lines in enumerate(_in_turn(len(prompt), stream, with_experts)):
            print(end="\n" if number else "")
            for found in lines:
                console.print(found)
        return
    for number, texts in enumerate(_in_turn(len(prompt), stream, lambda token: clean(token.text))):
        print("\n" if number else "", clean(prompt[number]), sep="", end="", flush=True)
        for text in texts:
            print(text, end="", flush=True)
        print()


def _check_edits(without: list[str], replay: Path | None, others: dict[str, bool]) -> dict[int, tuple[int, ...]]:
    """The experts that are off, by layer. Raises `UserError` for flags that say nothing together."""
    from manyhands.cli.edited import parse_experts

    if replay is not None and without:
        raise UserError("--replay and --without-expert are two experiments: leave one of them out")
    for flag, given in others.items():
        if given and (without or replay is not None):
            raise UserError(f"{flag} goes with one answer, --without-expert and --replay show two: leave it out")
    return parse_experts(without)


def _in_turn(
    count: int, stream: "Iterator[tuple[int, Token]]", show: "Callable[[Token], Shown]"
) -> "Iterator[Iterator[Shown]]":
    """For each prompt its tokens as they are shown, when they are made; or when it is its turn."""
    kept: list[deque[Shown]] = [deque() for _ in range(count)]
    ended = [False] * count

    def turn(number: int) -> "Iterator[Shown]":
        while kept[number] or not ended[number]:
            while not kept[number]:
                other, token = next(stream)
                kept[other].append(show(token))
                ended[other] = token.finish_reason is not None
            yield kept[number].popleft()

    for number in range(count):
        yield turn(number)


def _as_dicts(
    prompts: list[str], stream: "Iterator[tuple[int, Token]]", sampling: "SamplingConfig", show_routing: bool
) -> list[dict[str, object]]:
    """What was made of each, how, and for each token and sparse layer the experts that made it, first choice first."""
    ids: list[list[int]] = [[] for _ in prompts]
    texts: list[list[str]] = [[] for _ in prompts]
    routings: list[list[dict[str, object]]] = [[] for _ in prompts]
    reasons: list[str | None] = [None for _ in prompts]
    for number, token in stream:
        ids[number].append(token.token_id)
        texts[number].append(token.text)
        reasons[number] = token.finish_reason
        if show_routing:
            routings[number].append({str(layer): _experts(found) for layer, found in token.routings.items()})
    how = sampling.model_dump(mode="json")
    made: list[dict[str, object]] = [
        {"prompt": p, "text": "".join(texts[i]), "token_ids": ids[i], "finish_reason": reasons[i], "sampling": how}
        for i, p in enumerate(prompts)
    ]
    return [one | {"routing": routings[i]} for i, one in enumerate(made)] if show_routing else made


def _experts(routing: "Routing") -> dict[str, list[float]]:
    chosen = routing.expert_ids[0] >= 0
    return {
        "experts": routing.expert_ids[0][chosen].tolist(),
        "weights": routing.weights[0][chosen].tolist(),
    }
