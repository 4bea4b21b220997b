"""`manyhands chat`: talk with a model."""

import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from manyhands.errors import ManyhandsError, UserError

if TYPE_CHECKING:
    from manyhands.generate import Conversation, Step
    from manyhands.text import Tokenizer

_HELP = """\
/reset  forget the conversation, but not the system's message
/exit   leave (also Ctrl-D)
/help   this
Ctrl-C stops an answer."""
_UNPRINTABLE = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])
"""All control characters but tab and line break: a model must not steer the terminal."""
_TEMPLATE_BYTES = 1 << 20


def chat(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, a run, or a name on the Hugging Face hub.")],
    system: Annotated[str | None, typer.Option(help="A message from the system, in front of the first turn.")] = None,
    template: Annotated[
        Path | None, typer.Option(help="A chat template (jinja2) to use instead of the model's own.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of one answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, help="Only the k most probable tokens.")] = None,
    top_p: Annotated[float, typer.Option(help="Only the most probable tokens that together reach p.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Only tokens at least this probable relative to the best.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends an answer. Repeatable.")] = None,
    show_routing: Annotated[
        bool, typer.Option("--show-routing", help="Print each new token with the experts that made it.")
    ] = False,
) -> None:
    """Talk with a model, in its chat template: a line is a turn, /help shows the commands.

    From a pipe each line is a turn as well, and only the answers are printed.
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
    other = None if template is None else _read(template)

    from manyhands.checkpoint.model import load
    from manyhands.generate import Conversation

    model, tokenizer = load(checkpoint)
    if other is not None:
        tokenizer = tokenizer.with_chat_template(other)
    if tokenizer.chat_template is None:
        raise UserError(
            f"{checkpoint} has no chat template: `manyhands generate` continues text with it; "
            "to chat all the same, say how with --template FILE"
        )
    conversation = Conversation(model, tokenizer, sampling, system)
    interactive = sys.stdin.isatty()
    if interactive:
        print("/help shows the commands, Ctrl-D ends.", file=sys.stderr)
    for line in _lines(interactive):
        try:
            if line == "/exit":
                return
            _turn(conversation, line, show_routing, interactive)
        except ManyhandsError as error:
            if not interactive:
                raise
            print(f"manyhands: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            if not interactive:
                raise
            print("\n[stopped]", file=sys.stderr)


def _lines(interactive: bool) -> Iterator[str]:
    """What the user says, line by line, without empty ones."""
    if not interactive:
        yield from filter(None, map(str.strip, sys.stdin))
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives input() a history and an editor
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n[Ctrl-D or /exit ends]", file=sys.stderr)
            continue
        if line:
            yield line


def _turn(conversation: "Conversation", line: str, show_routing: bool, interactive: bool) -> None:
    if line == "/help":
        print(_HELP, file=sys.stderr)
    elif line == "/reset":
        conversation.reset()
    elif line.startswith("/") and line[1:].isalpha():
        print(f"manyhands: there is no command {line}; /help shows them", file=sys.stderr)
    else:
        steps = conversation.ask(line)
        with contextlib.closing(steps), _ctrl_c(interactive) as pressed:  # the answer so far is the turn
            _print_answer(conversation, _until(steps, pressed), show_routing)


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


def _print_answer(conversation: "Conversation", steps: "Iterator[Step]", show_routing: bool) -> None:
    number, reason = 0, None
    for step in steps:
        number, reason = number + 1, step.finish_reasons[0]
        if show_routing:
            _print_routing(conversation.tokenizer, step)
        else:
            print(step.texts[0].translate(_UNPRINTABLE), end="", flush=True)
    if not show_routing:
        print(flush=True)
    if reason == "length":
        full = number < conversation.sampling.max_new_tokens
        why = "the context is full: /reset starts a new conversation" if full else f"--max-new-tokens {number}"
        print(f"[cut off: {why}]", file=sys.stderr)


def _print_routing(tokenizer: "Tokenizer", step: "Step") -> None:
    from rich.console import Console

    from manyhands.generate.show_routing import routing_line

    token = step.token_ids[0]
    assert token is not None
    text = tokenizer.token_bytes(token).decode("utf-8", errors="replace")
    Console(highlight=False, soft_wrap=True).print(routing_line(text, step))


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
