"""`manyhands chat`: talk with a model."""

import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from manyhands.cli.chat_answer import print_answer
from manyhands.cli.chat_commands import ALIASES, COMMANDS, HELP, WANTING, act
from manyhands.cli.history import history_file, kept_history
from manyhands.cli.loudness import LOG, quiet
from manyhands.cli.options import (
    TRACE_LIMIT,
    Adapter,
    CachePolicy,
    IgnoreField,
    Memory,
    Pin,
    TraceDirectory,
    TraceLimit,
    on_disk,
)
from manyhands.cli.progress import Loading
from manyhands.cli.recorded import check_trace, recording
from manyhands.cli.size import size
from manyhands.cli.turns import command, turns
from manyhands.defaults import TEMPERATURE
from manyhands.errors import ManyhandsError, UserError
from manyhands.format import show
from manyhands.terminal import shown

if TYPE_CHECKING:
    from manyhands.generate import Conversation, Step

_TEMPLATE_BYTES = 1 << 20


def chat(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, a run, a GGUF file, or a name on the hub.")],
    system: Annotated[str | None, typer.Option(help="A message from the system, in front of the first turn.")] = None,
    template: Annotated[
        Path | None, typer.Option(help="A chat template (jinja2) to use instead of the model's own.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of one answer.")] = 512,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help=f"0: greedy. Default: the model's, else {TEMPERATURE}.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Only the k most probable tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Only the most probable tokens that together reach p.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Only tokens this probable relative to the best.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends an answer. Repeatable.")] = None,
    show_routing: Annotated[
        bool, typer.Option("--show-routing", help="Print each new token with the experts that made it.")
    ] = False,
    trace: TraceDirectory = None,
    trace_limit: TraceLimit = TRACE_LIMIT,
    memory: Memory = None,
    cache_policy: CachePolicy = None,
    pin: Pin = None,
    history: Annotated[
        bool, typer.Option("--history/--no-history", help="Keep what is typed for the next session's arrow keys.")
    ] = True,
    adapter: Adapter = None,
    ignore_field: IgnoreField = None,
) -> None:
    """Talk with a model, in its chat template: a line is a turn, /help shows the commands.

    A text of several lines goes between lines of three quotes, or is pasted. From a pipe each line is a turn as well,
    and only the answers are printed. What a reasoning model thinks is shown dimmed on a terminal, and nowhere else.
    Sampling is the model's own (generation_config.json) where a flag does not say otherwise.
    """
    from manyhands.generate.defaults import sampling_from

    asked = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    others = {"max_new_tokens": max_new_tokens, "seed": seed, "stop": tuple(stop or ())}
    sampling_from({}, asked, **others)  # a mistake is said before a model is loaded
    limit = size("--trace-limit", trace_limit)
    check_trace(trace)
    stay = on_disk(memory, cache_policy, pin)
    other = None if template is None else _read(template)

    from manyhands.checkpoint.model import load, only_decoder
    from manyhands.generate import Conversation

    with Loading(checkpoint) as read:
        loaded, tokenizer = load(checkpoint, ignore_fields=ignore_field or (), adapter=adapter, **stay)
    model = only_decoder(loaded, "chat")
    if other is not None:
        tokenizer = tokenizer.with_chat_template(other)
    if tokenizer.chat_template is None:
        raise UserError(
            f"{checkpoint} has no chat template: `manyhands generate` continues text with it; "
            "to chat all the same, say how with --template FILE"
        )
    read.said(model)
    sampling, line = sampling_from(tokenizer.files.generation, asked, **others)
    if line is not None:
        LOG.info("%s", line)
    with recording(model, tokenizer, trace, limit, "chat") as recorder:
        conversation = Conversation(model, tokenizer, sampling, system, recorder)
        _talk(conversation, show_routing, history)


def _talk(conversation: "Conversation", show_routing: bool, history: bool) -> None:
    interactive = sys.stdin.isatty()
    with kept_history(history_file()) if interactive and history else contextlib.nullcontext():
        _take_turns(conversation, show_routing, interactive)


def _take_turns(conversation: "Conversation", show_routing: bool, interactive: bool) -> None:
    if interactive:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell started in the background
        context = conversation.model.config.longest_continued
        LOG.info("context %s tokens; /help shows the commands, Ctrl-D ends", f"{context:,}")
    for text in turns(interactive):
        try:
            if not _turn(conversation, text, show_routing, interactive):
                return
        except ManyhandsError as error:
            if not interactive:
                raise
            print(f"manyhands: {shown(error)}", file=sys.stderr)
        except KeyboardInterrupt:
            if not interactive:
                raise
            print("\n[stopped]", file=sys.stderr)


def _turn(conversation: "Conversation", text: str, show_routing: bool, interactive: bool) -> bool:
    """Act on one turn. False: it was /exit."""
    try:
        first, _, rest = text.partition(" ")
        asked = command(" ".join(filter(None, (ALIASES.get(first, first), rest))), COMMANDS, WANTING)
    except ValueError as error:
        print(f"manyhands: {shown(error)}", file=sys.stderr)
        return True
    word, behind = asked or (None, "")
    if word == "/exit":
        return False
    if word == "/help":
        print("\n".join(f"{name:12} {what}" for name, what in COMMANDS.items()), HELP, sep="\n", file=sys.stderr)
    elif word is not None and word != "/regenerate":
        print(f"[{shown(act(conversation, word, behind))}]", file=sys.stderr)
    else:
        said = text.removeprefix("/") if text.startswith("//") else text
        steps = conversation.ask(said) if word is None else conversation.regenerate()
        if conversation.left_out:
            print(f"[the context is full: {conversation.left_out} of the oldest turns left out]", file=sys.stderr)
        with contextlib.closing(steps), _ctrl_c(interactive) as pressed:  # the answer so far is the turn
            number, seconds = print_answer(conversation, _until(steps, pressed), show_routing)
        if interactive and not quiet():
            speed = "" if seconds is None or number < 2 else f", {show((number - 1) / seconds, 'tok/s')}"
            print(f"[{number:,} tokens{speed}; {_filled(conversation, number)}]", file=sys.stderr)
    return True


def _filled(conversation: "Conversation", answer: int) -> str:
    """How much of the context is used, with an answer of so many tokens."""
    used, context = conversation.prompt_tokens + answer, conversation.model.config.longest_continued
    return f"{used:,} of {context:,} tokens in the context"


@contextlib.contextmanager
def _ctrl_c(interactive: bool) -> Iterator[list[int]]:
    """Ctrl-C is noted and acted upon after the token that is being made; pressed again, it interrupts at once.

    An exception out of nowhere can be lost where nobody may raise one, in a destructor say; a note is not.
    """
    pressed: list[int] = []
    if not interactive:
        yield pressed
        return

    def note(signum: int, _frame: object) -> None:
        pressed.append(signum)
        if len(pressed) > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _until(steps: "Iterator[Step]", pressed: list[int]) -> "Iterator[Step]":
    """The steps until Ctrl-C is noted."""
    for step in steps:
        yield step
        if pressed:
            raise KeyboardInterrupt


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_TEMPLATE_BYTES + 1)
        if len(data) > _TEMPLATE_BYTES:
            raise UserError(f"--template {path}: longer than 1 MiB")
        return data.decode("utf-8")
    except OSError as error:
        raise UserError(f"--template {path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--template {path}: not UTF-8 at byte {error.start}") from None
