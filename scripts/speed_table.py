"""Write the table of published speeds in docs/planning.md: measured, bound, share, estimate.

`python scripts/speed_table.py`

The estimate of a row is made without its own source's speeds.
"""

import math
from pathlib import Path

from manyhands.format import show
from manyhands.plan.estimate import Estimate, Point, estimate, published_points
from manyhands.plan.published_speeds import Compared, all_compared
from manyhands.plan.report.ask import short
from manyhands.plan.storage import CLASSES

PAGE = Path(__file__).parent.parent / "docs" / "planning.md"
BEGIN, END = "<!-- speeds, by scripts/speed_table.py -->", "<!-- end of speeds -->"


def table() -> str:
    """The table, what it sums up to, and the sources by number."""
    pairs = list(zip(all_compared(), published_points(), strict=True))
    estimates = [estimate(each.alone, each.layers, point.kind, without=point.group) for each, point in pairs]
    sources = list(dict.fromkeys(point.group for _, point in pairs))
    lines = [
        "| model, weights | machine | step | measured | bound | share | estimate | source |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (each, point), found in zip(pairs, estimates, strict=True):
        lines.append(row(each, found, sources.index(point.group) + 1))
    lines += ["", *summed(pairs, estimates), ""]
    for number, group in enumerate(sources, 1):
        speed = next(each.speed for each, point in pairs if point.group == group)
        when = f", {speed.date}" if speed.date else ""
        lines.append(f"{number}. {speed.engine}{when}: <{speed.url}> ({speed.note})")
    return "\n".join(lines)


def row(each: Compared, found: Estimate, number: int) -> str:
    """One speed."""
    speed = each.speed
    where = speed.machine + (f" + {speed.host}" if speed.host else "")
    changed = ", ".join(
        f"{name} {bits:g}" for name, bits in speed.bits.items() if name in CLASSES or name == "attention"
    )
    held = speed.format + (f" ({changed})" if changed else "")
    if speed.work == "decode":
        step = f"{speed.batch:,} at {speed.context:,}"
    else:
        step = f"prefill {speed.batch:,} x {short(speed.context)}"
    band = f"{tokens(found.low)}–{tokens(found.high)}"
    cells = (each.model + ", " + held, where, step, tokens(speed.tokens_per_second), tokens(each.bound.most_per_second))
    cells += (f"{each.share:.0%}", f"{tokens(found.tokens_per_second)} ({band})", f"{number}")
    return f"| {' | '.join(cells)} |"


def summed(pairs: list[tuple[Compared, Point]], estimates: list[Estimate]) -> list[str]:
    """How good the estimates are."""
    lines = []
    for name, chosen in (
        ("single sequences", [not p.kind.many and p.kind.work == "decode" and not p.kind.host for _, p in pairs]),
        ("all", [True] * len(pairs)),
    ):
        errors, held = [], 0
        for (each, _), found, wanted in zip(pairs, estimates, chosen, strict=True):
            if wanted:
                speed = each.speed.tokens_per_second
                errors.append(abs(math.log(found.tokens_per_second / speed)))
                held += found.low <= speed <= found.high
        near = sum(error <= math.log(1.25) for error in errors)
        middle = math.exp(sorted(errors)[len(errors) // 2]) - 1
        within = f"{near} of {len(errors)} estimates within 25 %, half within {middle:.0%}"
        lines.append(f"- {name}: {within}; {held} speeds lie in the band")
    return lines


def tokens(value: float) -> str:
    """Tokens per second in three or four digits."""
    return show(value, "tok/s").removesuffix(" tok/s")


def page() -> str:
    """docs/planning.md with the table as it is now."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
