"""`manyhands compare`: runs side by side."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from manyhands.compare.comparison import Comparison


def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN…", help="Runs, or folders of runs. The first one's configuration is A.")
    ],
    at: Annotated[
        Literal["last", "best"], typer.Option(help="Compare what runs reached at their last or their best validation.")
    ] = "last",
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page with the curves: one HTML file.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Compare runs: which configuration is better, by how much, how sure that is, and what each one cost.

    Runs that differ in nothing but train.seed are one configuration. Differences are paired by validation document, and
    their 95 % interval is over other documents of the same kind and other seeds. All must have been validated on the
    same text; with different tokenizers bits per byte are compared.
    """
    from manyhands.compare.comparison import compare as measure
    from manyhands.compare.pages.side_by_side import check_page

    if report is not None:
        check_page(report)
    show_comparison(measure(runs, at), report, json_output)


def show_comparison(found: "Comparison", report: Path | None, json_output: bool) -> None:
    """Write the page, if one is wanted, and print."""
    from manyhands.compare.pages.side_by_side import write_page
    from manyhands.compare.show import lines
    from manyhands.terminal import shown

    if report is not None:
        write_page(report, found)
    if json_output:
        import json

        print(json.dumps(found.described(), ensure_ascii=False, allow_nan=False))
        return
    print(*lines(found), sep="\n")
    if report is not None:
        print(f"\nwritten: {shown(report)}")
