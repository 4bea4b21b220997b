"""Sections as text: aligned columns, notes wrapped to the width, nothing that needs a terminal."""

import textwrap
from collections.abc import Iterator, Sequence

from manyhands.plan.report.figure import Cell, Figure, Section, Table

LEGEND = (
    "N active parameters without the input embedding, E experts, K experts per token, T tokens, c context, s sequence "
    "length, B batch, D model width, F expert width, H heads, G key/value heads, d head width, R latent rank and r its "
    "rotated width (MLA), h hit rate, R shards or devices (expert parallelism)"
)


def render(sections: Sequence[Section], width: int = 80, *, explain: bool = False, bold: bool = False) -> str:
    """All sections, one after the other. `explain` adds every formula with its source and the numbers in it."""
    blocks = ["\n".join(_section(section, width, explain, bold)) for section in sections]
    if explain:
        blocks.append("\n".join(wrapped(LEGEND, width, "")))
    return "\n\n".join(blocks)


def _section(section: Section, width: int, explain: bool, bold: bool) -> Iterator[str]:
    yield f"\033[1m{section.title}\033[0m" if bold else section.title
    if section.figures:
        yield from _figures(section.figures, width)
    if section.table is not None:
        yield from _table(section.table)
    for note in section.notes:
        yield from wrapped(note, width)
    formulas = {figure.formula.name: figure.formula for _, figure in section.all_figures() if figure.formula}
    if not explain:
        if formulas:
            yield from wrapped("by: " + "; ".join(formulas), width)
        return
    for formula in formulas.values():
        yield from wrapped(
            f"{formula.name} = {formula.expression}" + f"   [{formula.source}]" * bool(formula.source), width
        )
        for label, figure in section.all_figures():
            if figure.formula is formula:
                working = f" = {figure.working}" if figure.working else ""
                yield from wrapped(f"{label}{working} = {figure.shown}", width, "      ")


def _figures(figures: Sequence[Figure], width: int) -> Iterator[str]:
    label = max(len(figure.label) for figure in figures)
    value = max(len(figure.shown) for figure in figures)
    for figure in figures:
        line = f"  {figure.label:{label}}  {figure.shown:>{value}}"
        if figure.note and len(line) + len(figure.note) + 3 <= width:
            yield f"{line}   {figure.note}"
        else:
            yield line
            yield from wrapped(figure.note, width, "      ") if figure.note else ()


def _table(table: Table) -> Iterator[str]:
    rows = [[_shown(cell) for cell in row] for row in table.rows]
    widths = [max(len(row[i]) for row in [list(table.columns), *rows]) for i in range(len(table.columns))]
    text = [all(not isinstance(row[i], Figure) for row in table.rows) for i in range(len(table.columns))]
    for row in ([*table.columns], *rows):
        cells = (
            cell.ljust(w) if is_text else cell.rjust(w) for cell, w, is_text in zip(row, widths, text, strict=True)
        )
        yield ("  " + "  ".join(cells)).rstrip()


def _shown(cell: Cell) -> str:
    return cell if isinstance(cell, str) else cell.shown


def wrapped(text: str, width: int, indent: str = "  ") -> list[str]:
    """`text` in lines of `width`, continuation lines indented further."""
    return textwrap.wrap(
        text, max(width, 40), initial_indent=indent, subsequent_indent=indent + "  ", break_long_words=False
    )
