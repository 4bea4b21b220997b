"""The report as lines of at most 80 columns, the same on a terminal and in a pipe: one line per quantity."""

from collections.abc import Callable
from textwrap import fill

from rich.console import Console
from rich.markup import escape

from manyhands.check.report import CheckReport, Row
from manyhands.terminal import shown

MAX_FAILURES = 12
WIDTH = 38


def render(report: CheckReport, console: Console) -> None:
    """Print the largest error of every quantity, what ran, every failing row by name, then the verdict."""

    def line(text: str, style: str = "") -> None:
        wrapped = text if text[:1] in ("", " ") else fill(text, 80, subsequent_indent="    ", break_long_words=False)
        console.print(escape(shown(wrapped)), style=style, soft_wrap=True, highlight=False)

    if any(row.situation.scope == "layout" for row in report.rows):
        line("largest difference from one process, both in float64 with float32 routers")
        line(f"{'':{WIDTH}} {'':>10} {'':>10} {'compared':>9}")
    else:
        line("largest error against the float64 oracle (0 where it must be exact)")
        line(f"{'':{WIDTH}} {'float32':>10} {'bfloat16':>10} {'compared':>9}")
    for section in dict.fromkeys(_section(row) for row in report.rows):
        line(section, "bold")
        rows = [row for row in report.rows if _section(row) == section]
        for quantity in dict.fromkeys(row.quantity for row in rows):
            _line(line, quantity, [row for row in rows if row.quantity == quantity])
    line("")
    line("ran: " + ", ".join(dict.fromkeys(row.situation.backend for row in report.rows)))
    if report.calls:
        line(f"native calls: {', '.join(f'{n} {c}' for n, c in sorted(report.calls.items()) if ':' not in n)}")
    for note in report.read:
        line(note)
    if worst := report.worst_gradient():
        line(f"worst gradient: {worst.line().removeprefix('gradients: ')}")
    for dtype, routed in report.routed.items():
        line(f"{dtype}: {report.flips.get(dtype, 0)} of {routed} tokens chose another expert within rounding")
    for note in dict.fromkeys(report.skipped):
        line(f"not covered: {note}")
    for row in report.failures[:MAX_FAILURES]:
        line(f"FAILED {row.line()}", "red")
    if len(report.failures) > MAX_FAILURES:
        line(f"FAILED and {len(report.failures) - MAX_FAILURES} more rows (--json has all)", "red")
    verdict = "ok" if report.ok else f"{len(report.failures)} failed"
    line(f"{verdict}: {len(report.rows)} comparisons in {report.seconds:.1f} s", "green" if report.ok else "red")


def _section(row: Row) -> str:
    s = row.situation
    if s.scope == "layout":
        dp, ep = s.case.split("x")
        return f"{s.case}: {int(dp) * int(ep)} processes, experts over {ep}"
    if row.quantity == "ran without an error":
        return "what could not be computed"
    if s.scope == "checkpoint":
        return "this checkpoint's own weights"
    if s.scope == "experts on disk":
        return "experts on disk, beside the same in memory"
    if row.quantity.startswith("decoding: "):
        return "this model, generating" if s.scope == "model" else "every router and attention, generating"
    if s.scope == "model":
        return "this model, training"
    if s.backend == "attention":
        return "every kind of attention"
    if s.scope in ("parts", "loss head", "sizes", "coverage") or s.backend == "router":
        return "parts and sizes"
    return "every router, in one layer"


def _line(line: Callable[[str, str], None], quantity: str, rows: list[Row]) -> None:
    cells = []
    for column in (("float32", "float64", "–"), ("bfloat16",)):  # what has no dtype stands first
        here = [row for row in rows if row.situation.dtype in column]
        error = max((row.error for row in here), default=None)
        cells.append("–" if error is None else "0" if error == 0.0 else f"{error:.1e}")
    failed = sum(not row.ok for row in rows)
    name = quantity.removeprefix("decoding: ")
    text = f"  {name:{WIDTH - 2}} {cells[0]:>10} {cells[1]:>10} {len(rows):>9}"
    line(text + (f"  {failed} ✗" if failed else ""), "red" if failed else "")
