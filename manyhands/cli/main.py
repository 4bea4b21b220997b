"""The command line: verbs, exit codes, one line per mistake."""

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
from manyhands.errors import EndedElsewhere, ManyhandsError
from manyhands.terminal import shown
from manyhands.version import __version__

_LISTEN_SECONDS = 0.5  # torchrun ends a job when a process ends: the one that says why must come first

app = typer.Typer(
    name="manyhands",
    help="The toolkit for mixture-of-experts language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich doubles the time of --help
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train")(train.train)
app.command("tune")(tune.tune)
app.command("report")(report.report)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("eval")(evaluate.evaluate)
app.command("inspect")(inspect.inspect)
app.command("check")(check.check)
app.command("compare")(compare.compare)
app.command("sweep")(sweep.sweep)
app.command("convert")(convert.convert)
app.command("quantize")(quantize.quantize)
app.command("upcycle")(upcycle.upcycle)
app.command("prune")(prune.prune)
app.command("serve")(serve.serve)
app.command("presets")(presets.presets)
app.command("config")(config.config)
app.command("models")(models.models)
app.command("plan")(plan.plan)
app.command("choose")(choose.choose)
app.command("doctor")(doctor.doctor)
app.command("simulate")(simulate.simulate)
app.command("bench")(bench.bench)
app.add_typer(lab.app, name="lab")
app.add_typer(trace.app, name="trace")


def _version(asked: bool) -> None:
    if asked:
        print(f"manyhands {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """The toolkit for mixture-of-experts language models."""


def main() -> None:
    """Entry point. A user's mistake ends in one line on stderr and its exit code; `--debug` shows the traceback."""
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]  # before or after the verb
    try:
        app()
    except ManyhandsError as error:
        if debug:
            traceback.print_exc()
        if isinstance(error, EndedElsewhere):
            time.sleep(_LISTEN_SECONDS)
        else:
            print(f"manyhands: {shown(error)}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # the reader of our output left, as `| head` does
        sys.stderr.close()
        sys.exit(141)
    except KeyboardInterrupt:
        sys.exit(130)
