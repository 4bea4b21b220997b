"""The command line: verbs, exit codes, one line per mistake."""

import platform
import sys
import time
import traceback
from typing import Annotated

import typer

from manyhands.cli import (
    bench,
    chat,
    check,
    choose,
    compare,
    config,
    convert,
    doctor,
    evaluate,
    generate,
    inspect,
    lab,
    models,
    plan,
    presets,
    prune,
    quantize,
    report,
    serve,
    simulate,
    sweep,
    trace,
    train,
    tune,
    upcycle,
)
from manyhands.cli.endings import UsageMistake, discard_output, open_streams, refused, usage
from manyhands.cli.first import FIRST
from manyhands.cli.loudness import heard
from manyhands.cli.sections import Verb, Verbs
from manyhands.errors import EndedElsewhere, ManyhandsError, exit_code_of
from manyhands.terminal import shown
from manyhands.version import __version__

_LISTEN_SECONDS = 0.5  # torchrun ends a job when a process ends: the one that says why must come first

app = typer.Typer(
    name="manyhands",
    help="The toolkit for mixture-of-experts language models.",
    cls=Verbs,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich doubles the time of --help
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train", cls=Verb)(train.train)
app.command("tune", cls=Verb)(tune.tune)
app.command("report", cls=Verb)(report.report)
app.command("generate", cls=Verb)(generate.generate)
app.command("chat", cls=Verb)(chat.chat)
app.command("eval", cls=Verb)(evaluate.evaluate)
app.command("inspect", cls=Verb)(inspect.inspect)
app.command("check", cls=Verb)(check.check)
app.command("compare", cls=Verb)(compare.compare)
app.command("sweep", cls=Verb)(sweep.sweep)
app.command("convert", cls=Verb)(convert.convert)
app.command("quantize", cls=Verb)(quantize.quantize)
app.command("upcycle", cls=Verb)(upcycle.upcycle)
app.command("prune", cls=Verb)(prune.prune)
app.command("serve", cls=Verb)(serve.serve)
app.command("presets", cls=Verb)(presets.presets)
app.command("config", cls=Verb)(config.config)
app.command("models", cls=Verb)(models.models)
app.command("plan", cls=Verb)(plan.plan)
app.command("choose", cls=Verb)(choose.choose)
app.command("doctor", cls=Verb)(doctor.doctor)
app.command("simulate", cls=Verb)(simulate.simulate)
app.command("bench", cls=Verb)(bench.bench)
app.add_typer(lab.app, name="lab")
app.add_typer(trace.app, name="trace")


def _version(asked: bool) -> None:
    if asked:
        print(f"manyhands {__version__}", flush=True)
        import torch

        from manyhands.kernels.native import missing
        from manyhands.kernels.native.library import default_level

        absent = missing()
        print(f"native expert kernels: {default_level() if absent is None else f'none ({absent})'}")
        print(f"torch {torch.__version__}, Python {platform.python_version()}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version, the kernels in use, torch."
        ),
    ] = False,
) -> None:
    """The toolkit for mixture-of-experts language models."""
    if context.invoked_subcommand is None:
        print(FIRST, end="")


def main() -> None:
    """Entry point. A mistake ends in one line on stderr and its exit code; `--debug` shows the traceback."""
    open_streams()
    try:
        with heard():
            code = app(standalone_mode=False)
            sys.stdout.flush()
    except UsageMistake as error:
        code = _fail(usage(error))
    except (ManyhandsError, OSError) as error:
        code = _fail(error)
    except KeyboardInterrupt:
        code = 130
    if code:
        discard_output()
        sys.exit(code)


def _fail(error: ManyhandsError | OSError) -> int:
    """Say what went wrong; the exit code."""
    if isinstance(error, BrokenPipeError):  # the reader of our output left, as `| head` does
        return 141
    if "--debug" in sys.argv:
        traceback.print_exception(error)
    if isinstance(error, EndedElsewhere):
        time.sleep(_LISTEN_SECONDS)
    elif isinstance(error, ManyhandsError):
        print(f"manyhands: {shown(error)}", file=sys.stderr)
    else:
        print(f"manyhands: {shown(refused(error))} (--debug shows where)", file=sys.stderr)
    return exit_code_of(error)
