"""`manyhands report`: the page of a run, and its verdict, from its journal; of several runs one page more."""

from pathlib import Path
from typing import Annotated

import typer

from manyhands.cli.loudness import LOG


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Directories of runs, or their journals.")],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The page; of several runs the one they share. Default: report.html in the run's directory, "
            "compare.html beside the runs.",
        ),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 4 for a remark of the verdict too.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the verdicts as JSON.")] = False,
) -> None:
    """Judge runs and write their pages: from any journal, also of a run that was killed or still goes on.

    One page for each run, and of several runs one where they stand side by side, as in manyhands compare. What each
    expert takes is on the page only where the run itself ended, and a page that has it is not replaced: name another
    with --out. Exit code 4 if a run is not worth keeping (docs/verdicts.md).
    """
    import json

    from manyhands.compare.pages.one_run import write_page
    from manyhands.compare.read import read_run
    from manyhands.compare.verdict import judge
    from manyhands.terminal import shown

    past_runs = [read_run(path) for path in runs]
    several = len(runs) > 1
    shared = _side_by_side(runs, out) if several else None
    found, code = [], 0
    for path, past in zip(runs, past_runs, strict=True):
        verdict = judge(past.records, past.run)
        page = write_page(past, path, None if several else out, verdict)
        code = max(code, verdict.exit_code(strict))
        if json_output:
            told = {"run": str(path), "page": None if page is None else str(page), "verdict": verdict.as_json()}
            found.append(told | ({"side_by_side": None if shared is None else str(shared)} if several else {}))
            continue
        print(shown(f"{path}: {'its page stays: it shows what each expert takes' if page is None else page}"))
        print("\n".join(shown(line) for line in verdict.lines()))
    if json_output:
        print(json.dumps(found))
    elif shared is not None:
        print(shown(f"side by side: {shared}"))
    if code:
        raise typer.Exit(code)


def _side_by_side(runs: list[Path], out: Path | None) -> Path | None:
    """Write the page that the runs share; where nobody named it, what cannot be compared has none, and a line says why.

    Raises `UserError` where `out` is named and they cannot be compared, or another program's file stands there.
    """
    from manyhands.compare.comparison import compare
    from manyhands.compare.pages.side_by_side import check_page, write_page
    from manyhands.errors import UserError
    from manyhands.files import JOURNAL

    folders = [path.parent if path.name == JOURNAL and path.is_file() else path for path in runs]
    homes = {folder.resolve().parent for folder in folders}
    page = out or (folders[0].parent if len(homes) == 1 else Path()) / "compare.html"
    try:
        check_page(page)
        write_page(page, compare(folders))
    except UserError as error:
        if out is not None:
            raise
        LOG.warning("not side by side: %s", error)
        return None
    return page
