"""`manyhands models`: the catalogue as a table, and its published figures beside the computed ones."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from manyhands.cli import complete
from manyhands.cli.columns import print_table
from manyhands.errors import ConfigError
from manyhands.format import rounded

if TYPE_CHECKING:
    from manyhands.catalog import Entry
    from manyhands.plan import Counts
    from manyhands.plan.published import Comparison

MARKS = {"rumour": "?", "assumed": "*", "undisclosed": "not disclosed"}


def models(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]",
            help="One system: all its figures, prices and notes, with their sources.",
            autocompletion=complete.systems,
        ),
    ] = None,
    sparse: Annotated[bool, typer.Option("--sparse", help="Only mixtures of experts.")] = False,
    dense: Annotated[bool, typer.Option("--dense", help="Only dense models.")] = False,
    sort: Annotated[
        Literal["name", "total", "active", "released"], typer.Option(help="Largest or newest first; name: A to Z.")
    ] = "name",
    by: Annotated[
        Literal["year"] | None,
        typer.Option("--by", help="Count systems by year: sparse and dense, and experts per token of the sparse ones."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Every published figure beside the computed one; exit code 4 if one is off.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print as JSON, figures and sources included.")] = False,
) -> None:
    """The catalogue: published systems, dense and sparse, with what is known of each; or one of them, with sources.

    Counts are computed from the architecture. `?` marks a rumour, `*` an architecture that is assumed because it
    reproduces the published sizes. Active parameters are shown with and without the input embedding.
    """
    from manyhands.catalog import load

    if name is not None and (sparse or dense or sort != "name"):
        raise ConfigError("--sparse, --dense and --sort are about the table: leave them out, or leave NAME out")
    if by is not None and (name is not None or check or sort != "name"):
        raise ConfigError("--by year counts the systems of the table: leave NAME, --sort and --check out")
    chosen = _chosen(sparse, dense) if name is None else [load(name)]
    if by is not None:
        _by_year(chosen, json_output)
        return
    if check:
        _check({entry.id for entry in chosen}, json_output)
        return
    from manyhands.plan.published import counts_of

    if name is not None:
        _one(chosen[0], counts_of(chosen[0]), json_output)
        return
    rows = [(entry, counts_of(entry)) for entry in chosen]
    rows.sort(key=lambda row: _key(row[0], row[1], sort), reverse=sort != "name")
    if json_output:
        import json

        print(json.dumps([_described(entry, counts) for entry, counts in rows], ensure_ascii=False))
        return
    _table(rows)


def _one(entry: "Entry", counts: "Counts | None", json_output: bool) -> None:
    if json_output:
        import json

        print(json.dumps(_described(entry, counts), ensure_ascii=False))
        return
    import shutil

    from manyhands.cli.model_sheet import sheet

    width = min(shutil.get_terminal_size((80, 24)).columns, 120)
    print("\n".join(sheet(entry, counts, max(width, 40))))


def _by_year(chosen: "list[Entry]", json_output: bool) -> None:
    from manyhands.catalog.survey import by_year

    years = by_year(chosen)
    if json_output:
        import json
        from dataclasses import asdict

        print(json.dumps([asdict(year) | {"systems": year.systems} for year in years]))
        return
    columns = ("year", ">systems", ">sparse", ">dense", ">not disclosed", "experts per token: sparse systems")
    lines = []
    for year in years:
        visited = ", ".join(f"{k}: {count}" for k, count in year.experts_per_token.items())
        numbers = (year.systems, year.sparse, year.dense, year.not_disclosed)
        lines.append((str(year.year), *map(str, numbers), visited))
    print_table(columns, lines)
    print("\nOf the systems in this catalogue, which is a choice;\nthose that share an architecture count each.")


def _chosen(sparse: bool, dense: bool) -> "list[Entry]":
    from manyhands.catalog import entries

    wanted = {True} if sparse and not dense else {False} if dense and not sparse else {True, False, None}
    return [entry for entry in entries() if entry.sparse in wanted]


def _key(entry: "Entry", counts: "Counts | None", sort: str) -> Any:
    if sort == "name":
        return entry.id
    if sort == "released":
        return entry.released
    if counts is None:  # a rumour orders nothing
        return 0
    return counts.total if sort == "total" else counts.active


def _table(rows: "list[tuple[Entry, Counts | None]]") -> None:
    from manyhands.plan.report.ask import short

    columns = ("system", ">total", ">active", ">without emb.", ">experts", ">context", "released", "licence")
    lines = []
    for entry, counts in rows:
        context = "" if entry.context is None else short(entry.context)
        sizes, experts = _sizes(entry, counts), _experts(entry)
        lines.append((entry.id, *sizes, experts, context, entry.released, entry.license))
    print_table(columns, lines, spare=(">without emb.", "licence", "released"))


def _sizes(entry: "Entry", counts: "Counts | None") -> tuple[str, str, str]:
    if counts is not None:
        mark = MARKS.get(entry.architecture, "")
        numbers = (counts.total, counts.active, counts.active_without_embedding)
        total, active, without = (rounded(number) + mark for number in numbers)
        return total, active, without
    total_, active_ = (_quoted(entry, what) for what in ("total", "active"))
    return total_, active_, ""


def _quoted(entry: "Entry", what: str) -> str:
    figure = entry.figure(what)
    if figure is None:
        return ""
    return MARKS["undisclosed"] if figure.printed is None else figure.printed + MARKS.get(figure.kind, "")


def _experts(entry: "Entry") -> str:
    """`256 + 1, top 8`: in one layer, shared ones after the plus."""
    described = entry.mixture
    if described is None:
        quoted, top = (_quoted(entry, what) for what in ("experts", "top_k"))
        return f"{quoted}, top {top}" if top else quoted
    experts, shared, k = described
    return f"{experts}{f' + {shared}' if shared else ''}, top {k}"


def _described(entry: "Entry", counts: "Counts | None") -> dict[str, Any]:
    from dataclasses import asdict

    values = entry.model_dump(mode="json", exclude={"shape", "config_fields"}, exclude_none=True)
    for figure, dumped in zip(entry.figures, values["figures"], strict=True):
        dumped |= {"value": figure.value, "unit": figure.unit}
    if entry.mixture is not None:
        values["mixture"] = entry.mixture._asdict()
    if counts is not None:
        values["computed"] = asdict(counts)
    return values


def _check(chosen: set[str], json_output: bool) -> None:
    from manyhands.errors import CheckFailed
    from manyhands.plan.published import compare_all

    rows = [row for row in compare_all() if row.id in chosen]
    if json_output:
        import json
        from dataclasses import asdict

        print(json.dumps([asdict(row) | {"difference": row.difference} for row in rows], ensure_ascii=False))
    else:
        _check_table(rows)
        verdicts = [row.verdict for row in rows]
        shown = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts))
        print(f"{len(rows)} published figures of {len({row.id for row in rows})} systems:\n{shown}")
    off = [row for row in rows if row.verdict == "off"]
    if off:
        raise CheckFailed(
            f"{len(off)} published figures differ without an explanation, the first: {off[0].id} {off[0].what}"
        )


def _check_table(rows: "list[Comparison]") -> None:
    columns = ("system", "what", ">published", ">computed", ">difference", "the computed number", "because")
    lines = []
    for row in rows:
        mark, difference = MARKS.get(row.kind, ""), f"{100 * row.difference:+.2f} %"
        numbers = (row.printed + mark, row.computed_as_printed(), difference)
        lines.append((row.id, row.what, *numbers, row.verdict, row.because))
    print_table(columns, lines)
