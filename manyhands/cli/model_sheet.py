"""What `manyhands models NAME` prints: everything the catalogue knows of one system, each figure with its source."""

import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from manyhands.catalog import Entry, Figure
    from manyhands.plan import Counts

_LABELS = {
    "price_input": "price, 10^6 tokens in",
    "price_output": "price, 10^6 tokens out",
    "price_blended": "price, 10^6 tokens, 3 in to 1 out",
    "mmlu": "MMLU",
    "top_k": "experts per token",
    "active_without_embedding": "active, without embedding",
    "body": "active, body only",
}


def sheet(entry: "Entry", counts: "Counts | None", width: int = 80) -> list[str]:
    """Its lines, at most `width` wide but for addresses, which stay whole."""
    from manyhands.format import show
    from manyhands.plan.published import compare

    lines = [f"{entry.name} ({entry.id})"]
    lines += _wrap(f"{entry.org}, released {entry.released}; licence: {entry.license}", width)
    architecture = {"published": "published", "assumed": "assumed: it reproduces the published sizes"}
    said = architecture.get(entry.architecture, "not disclosed" if entry.kind != "mixture_1991" else "see its paper")
    kind = "" if entry.kind == "undisclosed" else f"{entry.kind.replace('_', '-')}, "
    lines += _wrap(f"{kind}architecture {said}", width)
    if entry.same_as:
        lines += _wrap(f"has the architecture of {entry.same_as}", width)
    if entry.based_on:
        lines += _wrap(f"made from {entry.based_on}", width)
    if counts is not None:
        lines += ["", "Computed from the architecture"]
        rows = [("total", counts.total), ("active", counts.active)]
        rows += [("active, without embedding", counts.active_without_embedding), ("active, body only", counts.body)]
        lines += [f"  {label:<26}{show(value, 'parameters'):>9}   {value:,}" for label, value in rows]
    if entry.mixture is not None:
        experts, shared, k = entry.mixture
        beside = f" and {shared} shared" if shared else ""
        lines += _wrap(f"experts of a sparse layer: {experts}{beside}, {k} per token", width)
    if entry.storage is not None:
        held = entry.storage
        bits = "/".join(f"{value:.4g}" for value in (held.routed, held.linear, held.embedding, held.rest))
        lines += _wrap(
            f"stored as {held.format}: {bits} bits per weight (routed experts / other matrices / embedding "
            f"and head / rest), {held.kind}",
            width,
        )
        lines += _wrap(held.source, width, "    ")
    if entry.figures:
        lines += ["", "Figures, as they were printed"]
        computed = {(row.what, row.printed): row for row in compare(entry)}
        for figure in entry.figures:
            row = computed.get((figure.what, figure.printed or ""))
            beside = f"; computed: {row.computed_as_printed()}, {row.verdict}" if row is not None else ""
            lines += _figure(figure, beside, width)
    if entry.notes:
        lines += ["", "Notes"]
        for note in entry.notes:
            lines += _wrap(f"- {note}", width)
    lines += ["", "Sources"]
    for source in entry.sources:
        lines += _wrap(source, width)
    return lines


def _figure(figure: "Figure", beside: str, width: int) -> list[str]:
    label = _LABELS.get(figure.what, figure.what.replace("_", " "))
    value = f"{figure.printed} {figure.unit}" if figure.printed is not None else "not disclosed"
    device = f" of {figure.device}" if figure.device else ""
    kind = "" if figure.printed is None else f" ({figure.kind}{beside})"
    lines = _wrap(f"{label}: {value}{device}{kind}", width)
    if figure.explanation:
        lines += _wrap(figure.explanation, width, "    ")
    return lines + _wrap(figure.source, width, "    ")


def _wrap(text: str, width: int, indent: str = "  ") -> list[str]:
    return textwrap.wrap(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=indent + "  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
