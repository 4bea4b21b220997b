"""`manyhands lab`: experiments that show what is claimed of mixtures of experts, or do not."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from manyhands.cli import complete, lab_claims
from manyhands.cli.loudness import LOG, quiet
from manyhands.cli.sections import Verb, Verbs
from manyhands.errors import Interrupted, ManyhandsError, UserError
from manyhands.terminal import shown

if TYPE_CHECKING:
    from collections.abc import Callable

    from manyhands.lab.run import Result

app = typer.Typer(
    cls=Verbs,
    help="Experiments that show what is claimed of mixtures of experts, or do not. Without a command: which there are.",
    rich_markup_mode=None,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("claims", cls=Verb)(lab_claims.claims)
_FAILED = 4
"""Exit code where a stated criterion did not hold, as of `check`."""


@app.callback()
def _list(
    context: typer.Context, json_output: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False
) -> None:
    if context.invoked_subcommand is not None:
        if json_output:
            raise UserError(f"--json goes behind the command: lab {context.invoked_subcommand} … --json")
        return
    from manyhands.lab.registry import describe, names

    found = {name: describe(name) for name in names()}
    if json_output:
        import json

        print(json.dumps({name: about.model_dump(mode="json") for name, about in found.items()}, ensure_ascii=False))
        return
    from manyhands.cli.columns import print_table

    rows = [(name, f"{about.minutes:g}", about.question) for name, about in found.items()]
    print_table(("experiment", ">minutes", "question"), rows)
    print("\nmanyhands lab run NAME runs one; --quick: seconds, the direction only.")
    print("manyhands lab claims says what is claimed, and what is so.")


@app.command("run", cls=Verb)
def run(
    experiments: Annotated[
        list[str] | None, typer.Argument(metavar="NAME…", help="`lab` lists them.", autocompletion=complete.experiments)
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Seconds instead of minutes: the direction only.")] = False,
    seeds: Annotated[
        int | None, typer.Option(min=1, max=1000, help="How many, from 0; default: as the experiment says.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Data that does not ship with the program."),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page with the curves: one HTML file.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print as JSON: a list.")] = False,
) -> None:
    """Run experiments: what was published, what is different here, the figures, and whether it was reproduced.

    Ends with exit code 4 if a criterion that was stated beforehand does not hold.
    """
    from manyhands.lab.registry import describe, names
    from manyhands.lab.run import run_experiment
    from manyhands.lab.show import lines

    if every == bool(experiments):
        raise UserError("lab run: name one or several experiments, or --all; `manyhands lab` lists them")
    wanted = names() if every else list(dict.fromkeys(experiments or ()))
    if data is not None and len(wanted) > 1:
        raise UserError("--data: goes with one experiment")
    for name in wanted:
        describe(name)
    if report is not None:
        from manyhands.lab.page import check_page

        check_page(report)
    results: list[Result] = []
    failed: list[str] = []
    try:
        for name in wanted:
            try:
                with _saying(name) as note, _stopped_in(name):
                    result = run_experiment(name, quick=quick, seeds=seeds, data=data, note=note)
            except Interrupted:
                raise
            except ManyhandsError as error:  # what is wrong with one is no reason to lose the others
                if len(wanted) == 1:
                    raise
                failed.append(name)
                LOG.error("%s: could not be run: %s", name, error)
                continue
            results.append(result)
            if not json_output:
                print(*(["\n"] if len(results) > 1 else []), *lines(result), sep="\n", flush=True)
            if report is not None:  # after each, so that nothing is lost
                from manyhands.lab.page import write_page

                write_page(report, results)
    finally:  # whatever ended it: what was found is said
        if json_output and results:
            import json

            print(json.dumps([result.described() for result in results], ensure_ascii=False), flush=True)
    if report is not None and results and not json_output:
        print(f"\nwritten: {shown(report)}")
    if failed:
        raise UserError(f"{len(failed)} of {len(wanted)} experiments could not be run: {', '.join(failed)}")
    if not all(result.outcome.passed for result in results):
        raise typer.Exit(_FAILED)


@contextmanager
def _saying(name: str) -> "Iterator[Callable[[str], None]]":
    """Where an experiment is, on stderr: one line that changes on a terminal, plain lines otherwise."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal or quiet():
        yield lambda text: LOG.info("%s: %s", name, text)
        return
    with console.status(name, spinner="dots") as status:
        yield lambda text: status.update(f"{name}: {shown(text)}")


@contextmanager
def _stopped_in(name: str) -> Iterator[None]:
    """Ctrl-C and SIGTERM end in one line, after the files of the experiment are gone: a training run in it, which says
    that it can go on, has been deleted with them."""

    def stop(number: int, frame: object) -> None:
        raise _stopped(name, 128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        raise _stopped(name, 128 + signal.SIGINT) from None
    except Interrupted as error:
        raise _stopped(name, error.exit_code) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _stopped(name: str, code: int) -> Interrupted:
    stopped = Interrupted(f"stopped in {name}: nothing of it is kept; run it again")
    stopped.exit_code = code
    return stopped
