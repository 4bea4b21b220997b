"""Claims as lines for a terminal, and as a page of documentation: one wording for both."""

import textwrap
from collections.abc import Iterator, Sequence

from manyhands.format import show
from manyhands.lab.claims import Claim, Finding, Group, Letter, answer, findings, read_claims

_PROGRAM = "manyhands"
_ORDER = ("true", "caveat", "false", "unverifiable")
LOST = "list missing in the document"
_INTRODUCTION = """\
Both are good. This page goes through what they claim, in our own words and with their line numbers, and says of each
claim what is so, on what ground, and which command shows it. Figures are computed from published architectures each
time: `manyhands lab claims --check` holds them against the documents, and `manyhands lab claims` prints this page on a
terminal (`--document A`, `--only balance`). Where a claim is about learning or time, an experiment of [the lab](lab.md)
decides it on an ordinary machine, and that page has its figures."""


def lines(chosen: Sequence[tuple[Group, Sequence[Claim]]], width: int, *, bold: bool = False) -> Iterator[str]:
    """Every claim with its verdict, what is said, what is so, and what shows it. `bold`: titles and verdicts are."""
    on, off = ("\033[1m", "\033[0m") if bold else ("", "")
    for group, claims in chosen:
        yield f"{on}{group.title}{off}"
        for claim in claims:
            yield ""
            yield f"{on}{claim.id:>3}  {claim.verdict}{off}  ({lines_of(claim.where) or 'in neither'}){_lost(claim)}"
            for text in _told(claim, answer(claim, findings(claim))):
                yield from _wrapped(text, width)
            for command in shown_by(claim):
                yield f"     $ {command}"
        yield ""
    yield tally(chosen)


def brief_lines(chosen: Sequence[tuple[Group, Sequence[Claim]]], width: int, *, bold: bool = False) -> Iterator[str]:
    """One line per claim: its number, the verdict, and what is said, as far as it fits."""
    on, off = ("\033[1m", "\033[0m") if bold else ("", "")
    verdict = max(map(len, _ORDER))
    for group, claims in chosen:
        yield f"{on}{group.title}{off}"
        for claim in claims:
            line = f"{claim.id:>3}  {claim.verdict:<{verdict}}  {claim.says}"
            yield line if len(line) <= width else line[: width - 1].rstrip() + "…"
        yield ""
    yield tally(chosen)


def check_lines(found: Sequence[tuple[Claim, Finding]]) -> Iterator[str]:
    """Every figure: computed, as a document prints it, how far apart, and whether the verdict follows."""
    head = ("claim", "figure", "computed", "document", "difference", "")
    rows = [head]
    for claim, finding in found:
        figure, difference = finding.figure, finding.difference
        asked = _asked(finding)
        rows.append(
            (
                str(claim.id),
                figure.label,
                finding.shown,
                f"{figure.by}: {finding.shown_printed}" if figure.by else "",
                "" if difference is None else f"{difference:+.1%}",
                asked if finding.holds else f"OFF: {asked}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    for row in rows:
        cells = (row[i].ljust(w) if i in (1, 3, 5) else row[i].rjust(w) for i, w in enumerate(widths))
        yield "  ".join(cells).rstrip()


def markdown() -> str:
    """docs/claims.md."""
    claims = read_claims()
    text = [
        "# What two introductions say, and what is so",
        "",
        "This project began with two introductions to mixtures of experts:",
        "",
        *(f"- **{letter}**: *{d.title}*, {d.about}" for letter, d in claims.documents.items()),
        "",
        _INTRODUCTION,
        "",
        "| verdict | means | claims |",
        "|---|---|---|",
    ]
    meaning = {
        "true": "it is so",
        "caveat": "so under a condition, or in part",
        "false": "it is not so",
        "unverifiable": "nobody has said, or nothing that can be measured follows from it",
    }
    every = list(claims.all())
    text += [f"| {name} | {meaning[name]} | {sum(c.verdict == name for c in every)} |" for name in _ORDER]
    for group in claims.group:
        text += ["", f"## {group.title}"]
        for claim in group.claim:
            text += ["", *_entry(claim)]
    return "\n".join(text) + "\n"


def lines_of(where: dict[Letter, tuple[int, ...]]) -> str:
    """`A 5, 9; B 23–25`."""
    return "; ".join(f"{letter} {_ranges(numbers)}" for letter, numbers in where.items())


def shown_by(claim: Claim) -> list[str]:
    """The commands that show it, as one types them."""
    return [f"{_PROGRAM} {command}" for command in claim.commands] + [
        f"{_PROGRAM} lab run {name}" for name in claim.experiments
    ]


def tally(chosen: Sequence[tuple[Group, Sequence[Claim]]]) -> str:
    """`80 claims: 30 true, …`."""
    claims = [claim for _, found in chosen for claim in found]
    counts = [(name, sum(claim.verdict == name for claim in claims)) for name in _ORDER]
    told = ", ".join(f"{count} {name}" for name, count in counts if count)
    return f"{len(claims)} claim{'s' if len(claims) > 1 else ''}: {told}"


def _told(claim: Claim, so: str) -> list[str]:
    who = "Both documents say" if len(claim.where) > 1 else "The document says"
    said = f"{who}: {claim.says}." if claim.where else f"Not said, {claim.says}."
    return [said, so + (f" ({claim.source})" if claim.source else "")]


def _entry(claim: Claim) -> list[str]:
    so = answer(claim, findings(claim))
    said, told = _told(claim, so)
    lines = [f"**{claim.id}. {claim.verdict}** ({lines_of(claim.where) or 'in neither'}){_lost(claim)} — {said}"]
    lines += ["", told]
    if shown_by(claim):
        linked = [f"`{_PROGRAM} {command}`" for command in claim.commands]
        linked += [f"[`{_PROGRAM} lab run {name}`](lab.md#{name})" for name in claim.experiments]
        lines += ["", " · ".join(linked)]
    return lines


def _lost(claim: Claim) -> str:
    return f" [{LOST}: {lines_of(claim.lost)}]" if claim.lost else ""


def _asked(finding: Finding) -> str:
    figure = finding.figure
    parts = []
    if figure.tolerance is not None:
        parts.append(f"{'within' if figure.agrees else 'more than'} {100 * figure.tolerance:.3g} %")
    parts += [f"at least {show(figure.at_least, figure.unit)}"] if figure.at_least is not None else []
    parts += [f"at most {show(figure.at_most, figure.unit)}"] if figure.at_most is not None else []
    return ", ".join(parts)


def _ranges(numbers: tuple[int, ...]) -> str:
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}–{part[-1]}" for part in parts)


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(
        text, width, initial_indent=" " * 5, subsequent_indent=" " * 5, break_long_words=False, break_on_hyphens=False
    )
