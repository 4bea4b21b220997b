"""`doctor --speeds`: how fast this machine runs models of usual sizes, and what share of its limits that is."""

import sys
from typing import TYPE_CHECKING

from manyhands.format import show

if TYPE_CHECKING:
    from manyhands.plan.here import Here
    from manyhands.plan.recorded import RecordedSpeed
    from manyhands.plan.report.figure import Section


def run_typical(here: "Here", load: float | None, *, quiet: bool) -> None:
    """Run, remember, and say what stands in the way. Raises `UserError` where the speeds would mislead."""
    import torch

    from manyhands.errors import UserError
    from manyhands.generate.typical import FORMATS, SHAPES, typical_speeds
    from manyhands.plan.host import free_memory
    from manyhands.plan.recorded import record, why_not

    if (why := why_not(here, torch.get_num_threads(), load)) is not None:
        raise UserError(f"--speeds: {why}")
    number = 0
    for format, found in typical_speeds(here, free_memory() or here.processor.memory):
        number += 1
        if not quiet:
            done = f"{number} of {len(SHAPES) * len(FORMATS)}"
            print(f"{done}: {found[0].model if found else 'a model'}, {format}", file=sys.stderr, flush=True)
        record(found)
    if not number:
        raise UserError("--speeds: too little free memory for the smallest model")


def speeds_section(here: "Here", speeds: "tuple[RecordedSpeed, ...]") -> "Section | None":
    """What is remembered of this machine, by kind of step; None without anything."""
    from manyhands.plan.estimate import fit
    from manyhands.plan.recorded import recorded_points
    from manyhands.plan.report import formulas as f
    from manyhands.plan.report.figure import Cell, Figure, Section, Table

    points = recorded_points(here, speeds)
    kinds = sorted({point.kind for point in points}, key=lambda kind: (kind.work, kind.many, kind.format or ""))
    rows: list[tuple[Cell, ...]] = []
    for kind in kinds:
        mine = [point for point in points if point.kind == kind]
        law = fit(mine, kind)
        shares = sorted(point.bound / point.taken for point in mine)
        step = f"{kind.work}{', together' if kind.many else ''}, {kind.format}"
        rows.append(
            (
                step,
                f"{len(mine)}",
                Figure("share of the bound, at least", shares[0], "share", key="least"),
                Figure("share of the bound, at most", shares[-1], "share", key="most"),
                Figure("a", law.share, "share", f.EXPECTED, f"{len(mine)} speeds"),
                Figure("c", law.constant, "s", f.EXPECTED, f"{len(mine)} speeds"),
            )
        )
    if not rows:
        return None
    columns = ("recorded speeds", "of", "share, from", "to", "a", "c a layer")
    notes = [f"kept for the estimates of plan --machine here; {show(here.processor.bandwidth, 'B/s')} read bandwidth"]
    keys = ("step", "speeds", "least", "most", "share", "constant")
    return Section("speeds", "Speeds that were reached here", (), Table(columns, tuple(rows), keys), notes)
