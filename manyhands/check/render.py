"""The report as a table for a terminal: one line per quantity, one column per backend and dtype."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from manyhands.check.report import CheckReport, Row

MAX_FAILURES = 12


def render(report: CheckReport, console: Console) -> None:
    """Print the largest error of every quantity, then every failing row by name, then the verdict."""
    columns = list(dict.fromkeys((row.situation.backend, row.situation.dtype) for row in report.rows))
    table = Table(title="largest error against the float64 dense oracle (0 where it must be exact)")
    table.add_column("quantity")
    for backend, dtype in columns:
        table.add_column(f"{backend}\n{dtype}", justify="right")
    table.add_column("compared", justify="right")
    for scopes, label in ((("model",), "model"), (None, "single layer, every router")):
        rows = [row for row in report.rows if (row.situation.scope == "model") == (scopes is not None)]
        if rows:
            table.add_section()
            table.add_row(f"[bold]{label}[/]")
            _section(table, rows, columns)
    console.print(table)

    if worst := report.worst_gradient():
        console.print(f"worst gradient: {escape(worst.line().removeprefix('gradients: '))}")
    for dtype, routed in report.routed.items():
        flips = report.flips.get(dtype, 0)
        console.print(f"{dtype}: {flips} of {routed} tokens chose another expert within rounding")
    for note in dict.fromkeys(report.skipped):
        console.print(f"skipped: {escape(note)}")
    for row in report.failures[:MAX_FAILURES]:
        console.print(f"[red]FAILED[/] {escape(row.line())}")
    if len(report.failures) > MAX_FAILURES:
        console.print(f"[red]FAILED[/] and {len(report.failures) - MAX_FAILURES} more rows (--json has all)")
    verdict = "[green]ok[/]" if report.ok else f"[red]{len(report.failures)} failed[/]"
    console.print(f"{verdict}: {len(report.rows)} comparisons in {report.seconds:.1f} s")


def _section(table: Table, rows: list[Row], columns: list[tuple[str, str]]) -> None:
    for quantity in dict.fromkeys(row.quantity for row in rows):
        mine = [row for row in rows if row.quantity == quantity]
        cells = []
        for column in columns:
            here = [row for row in mine if (row.situation.backend, row.situation.dtype) == column]
            cells.append(_cell(here))
        table.add_row(quantity, *cells, str(len(mine)))


def _cell(rows: list[Row]) -> str:
    if not rows:
        return "–"
    error = max(row.error for row in rows)
    shown = "0" if error == 0.0 else f"{error:.1e}"
    return shown if all(row.ok for row in rows) else f"[red]{shown} ✗[/]"
