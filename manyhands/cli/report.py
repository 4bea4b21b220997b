"""`manyhands report`: the page of a run, and its verdict, from its journal."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Directories of runs, or their journals.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The page. Default: report.html in the run's directory.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 4 for a remark of the verdict too.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the verdicts as JSON.")] = False,
) -> None:
    """Judge runs and write their pages: from any journal, also of a run that was killed or still goes on.

    One page for each run. What each expert takes is on the page only where the run itself ended, and a page that has
    it is not replaced: name another with --out. Exit code 4 if a run is not worth keeping (docs/verdicts.md).
    """
    import json

    from manyhands.compare.page import write_page
    from manyhands.compare.read import read_run
    from manyhands.compare.verdict import judge
    from manyhands.errors import UserError
    from manyhands.terminal import shown

    if out is not None and len(runs) > 1:
        raise UserError(f"--out names one page, and there are {len(runs)} runs: leave it out, or name one run")
    found, code = [], 0
    for path in runs:
        past = read_run(path)
        verdict = judge(past.records, past.run)
        page = write_page(past, path, out, verdict)
        code = max(code, verdict.exit_code(strict))
        if json_output:
            found.append({"run": str(path), "page": None if page is None else str(page), "verdict": verdict.as_json()})
            continue
        print(shown(f"{path}: {'its page stays: it shows what each expert takes' if page is None else page}"))
        print("\n".join(shown(line) for line in verdict.lines()))
    if json_output:
        print(json.dumps(found))
    if code:
        raise typer.Exit(code)
