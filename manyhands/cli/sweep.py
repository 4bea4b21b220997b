"""`manyhands sweep`: the runs of a file, one after the other or side by side, and their comparison."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from manyhands.cli.loudness import LOG
from manyhands.errors import ManyhandsError, UserError
from manyhands.terminal import shown

if TYPE_CHECKING:
    from manyhands.compare.sweep import State


def sweep(
    file: Annotated[Path, typer.Argument(help="The sweep's file (YAML): preset or config, set, grid or runs, seeds.")],
    out: Annotated[Path | None, typer.Option(help="The folder of its runs. Default: runs/NAME of the file.")] = None,
    parallel: Annotated[int, typer.Option(min=1, max=64, help="So many runs at a time share the cores.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the runs, and how far each one is.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON.")] = False,
) -> None:
    """Train a grid or a list of changes from several seeds, and compare what came out.

    What is finished is not done again, and a run that was stopped goes on where it was: start the same sweep again. A
    run that fails does not stop the others, and is named at the end. FOLDER/compare.html has the comparison,
    FOLDER/logs what each run said.
    """
    from manyhands.compare.sweep import command, state_of
    from manyhands.compare.sweep import sweep as train_all
    from manyhands.compare.sweep_file import read_sweep

    planned = read_sweep(file)
    home = out or Path("runs") / file.stem
    if home.exists() and not home.is_dir():
        raise UserError(f"{home}: exists and is not a directory; choose another --out")
    if dry_run:
        places = [home / each.name for each in planned]
        states = [state_of(each, place) for each, place in zip(planned, places, strict=True)]
        commands = [command(each, place) for each, place in zip(planned, places, strict=True)]
        _list(places, states, commands, json_output)
        return
    from manyhands.compare.pages.side_by_side import check_page

    page = home / "compare.html"
    check_page(page)
    budget = any(each.run.train.max_seconds is not None for each in planned)
    if parallel > 1 and budget:
        _say("train.max_seconds: runs side by side share the machine, so each takes fewer steps than it would alone")
    _say(f"{len(planned)} runs in {home}")
    every = train_all(planned, home, parallel=parallel, say=_say)
    problems = [f"{each.planned.name}: {each.error}" for each in every if each.failed]
    said = f"{len(problems)} of {len(every)} runs failed: " if problems else ""
    try:
        _compare([each.directory for each in every if not each.failed], page, json_output)
    except UserError as error:
        problems.append(f"the runs cannot be compared: {error}")
    if problems:
        raise ManyhandsError(said + "; ".join(problems))


def _compare(finished: list[Path], page: Path, json_output: bool) -> None:
    from manyhands.cli.compare import show_comparison
    from manyhands.compare.comparison import compare

    if len(finished) < 2:
        _say("fewer than two runs came to their end: there is nothing to compare")
        return
    show_comparison(compare(finished), page, json_output)


def _list(places: list[Path], states: "list[State]", commands: list[list[str]], json_output: bool) -> None:
    rows = list(zip(places, states, commands, strict=True))
    if json_output:
        import json

        told = [
            {"name": place.name, "directory": str(place), "state": state, "command": ["manyhands", *words]}
            for place, state, words in rows
        ]
        print(json.dumps(told, ensure_ascii=False))
        return
    import shlex

    for _, state, words in rows:
        print(shown(f"{state:12}manyhands {shlex.join(words)}"))


def _say(text: str) -> None:
    LOG.info("%s", text)
