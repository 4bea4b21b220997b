"""An answer of `choose` as sections for people: a table for each layout, what limits each row, what lost and why."""

from dataclasses import dataclass, replace

from manyhands.format import NONE, compact, show
from manyhands.plan.choose import Beaten, Chosen, first_of_each_layout
from manyhands.plan.estimate import DECODE, Estimate, Kind, estimate
from manyhands.plan.offer import Loss, Offer, longest_context, most_users
from manyhands.plan.recorded import format_kind
from manyhands.plan.report.ask import short
from manyhands.plan.report.figure import Cell, Figure, Section, Table
from manyhands.plan.roof import MATRIX, WAIT, bound_of
from manyhands.plan.tiers import LAYOUTS, Layout
from manyhands.plan.wish import Wish

TITLES: dict[Layout, str] = {
    "memory": "All in memory",
    "host": "Experts in host memory too",
    "disk": "Experts on disk too",
}
LOSSES, BEATEN = 5, 3
"""Of what lost, and of what another one beats, so many are named."""


@dataclass(frozen=True, slots=True)
class Shown:
    """One offer with what is only computed for those that are shown."""

    number: int
    offer: Offer
    most_users: int
    longest_context: int
    wider: Loss | None
    expected: Estimate | None
    """Of all users of one copy together; None where experts lie on disk, of which no speeds are known to go by."""


def shown(chosen: Chosen, rows: int) -> list[Shown]:
    """The first `rows` of each layout, numbered."""
    found = []
    for number, i in enumerate(first_of_each_layout(chosen.offers, rows), 1):
        made = chosen.offers[i]
        layout = made.tiers.layout
        most = most_users(made.case, made.place, layout)
        longest = longest_context(made.case, made.place, made.users, layout)
        found.append(Shown(number, made, most, longest, chosen.wider.get(i), _expected(made)))
    return found


def _expected(made: Offer) -> Estimate | None:
    """The bound of all tiers, and what is lost on the way to it."""
    if made.tiers.layout == "disk":
        return None
    case, machine = made.case, made.place.machine
    bound = bound_of(machine, case.sizes, case.storage, *case.decoded(made.users))
    read = max(took for what, took in made.seconds.items() if what not in (MATRIX, WAIT))
    kind = Kind(
        DECODE,
        many=made.users > 1,
        several=machine.devices > 1,
        host=machine.kind == "cpu" or made.tiers.layout == "host",
        format=format_kind(case.storage, sparse=bool(case.sizes.num_experts)),
    )
    return estimate(replace(bound, read_seconds=read), len(case.sizes.windows), kind, made.place.recorded)


def build_choice(chosen: Chosen, rows: list[Shown], wish: Wish, *, machines: int, models: int) -> list[Section]:
    """`machines`, `models`: how many were asked about; of one, its column is left out."""
    sections = [
        _offers(layout, found, machines=machines, models=models)
        for layout in LAYOUTS
        if (found := [row for row in rows if row.offer.tiers.layout == layout])
    ]
    if rows:
        details = [_detail(row, machines) for row in rows]
        sections.append(Section("limits", "What limits each, and what stands in the way of more", notes=details))
    if lost := _lost(chosen, rows, machines, models):
        sections.append(lost)
    if (about := _notes(chosen, rows, wish)) and sections:
        sections.append(Section("notes", "How to read this", notes=about))
    return sections


def _offers(layout: Layout, rows: list[Shown], *, machines: int, models: int) -> Section:
    prices, both = any(row.offer.per_hour is not None for row in rows), machines > 1 and models > 1
    columns = ["", *(["model"] if models > 1 else []), *(["machine"] if machines > 1 else []), "format"]
    columns += [] if both else ["needs"]
    columns += ["tok/s", "estimate"]
    columns += ["USD/h", *([] if both else ["USD/M out"])] if prices else []
    columns += [] if machines > 1 or prices else ["users", "ctx"]
    table = tuple(_row(row, set(columns)) for row in rows)
    return Section(layout, TITLES[layout], table=Table(tuple(columns), table))


def _row(row: Shown, columns: set[str]) -> tuple[Cell, ...]:
    made = row.offer
    cells: list[Cell] = [Figure("", row.number, "")]
    cells += [made.case.id] if "model" in columns else []
    cells += [machine_of(made)] if "machine" in columns else []
    cells += [format_of(made)]
    cells += [Figure("needs", made.need.total, "B")] if "needs" in columns else []
    cells += [Figure("tok/s", made.speed, ""), _band(row, "USD/h" not in columns)]
    cells += [_usd(made.per_hour)] if "USD/h" in columns else []
    cells += [_usd(made.per_million)] if "USD/M out" in columns else []
    cells += [f"{row.most_users:,}", _short(row.longest_context)] if "users" in columns else []
    return tuple(cells)


def _band(row: Shown, whole: bool) -> str:
    """`24 (15-38)`."""
    found = row.expected
    if found is None:
        return NONE
    each, low, high = (_three(value / row.offer.users) for value in (found.tokens_per_second, found.low, found.high))
    return f"{each} ({low}-{high})" if whole else each


def _three(value: float) -> str:
    """Three digits: the band is wider than a fourth."""
    return f"{value:.3g}" if value < 999.5 else compact(value)


def _usd(value: float | None) -> str:
    return NONE if value is None else f"{value:,.2f}" if value >= 0.095 else f"{value:.2g}"


def _short(context: int) -> str:
    """Whole thousands (of 1024), rounded down; small ones in full."""
    return short(context if context < 1024 else context // 1024 * 1024)


def format_of(made: Offer) -> str:
    """`mxfp4*`: as published."""
    return made.case.storage.name + "*" * made.case.native


def machine_of(made: Offer) -> str:
    """`3 x h100x8` are three of them."""
    name = made.place.machine.name
    return name if made.copies == 1 else f"{made.copies} x {name}"


def _detail(row: Shown, machines: int) -> str:
    made = row.offer
    (limit, took), *others = made.limits
    said = [limit + (f", next {others[0][0]} at {took / others[0][1]:.3g}x the speed" if others else "")]
    if made.tiers.layout != "memory":
        share = made.tiers.device / made.tiers.routed
        where = "on the device" if made.place.machine.kind == "gpu" else "in memory"
        places = f"{share:.0%} of the experts {where}"
        if made.tiers.host:
            places += f", {made.tiers.host / made.tiers.routed:.0%} in host memory"
        said.append(places)
    if made.first is not None:
        said.append(f"first token after {show(made.first, 's')}")
    if machines > 1 or made.per_hour is not None:
        each = " on each" if made.copies > 1 else ""
        many = "1 user" if row.most_users == 1 else f"{row.most_users:,} users"
        said.append(f"{many}{each} or {_short(row.longest_context)} context fit")
    if made.copies > 1:
        said.append(f"{made.copies} machines of {made.users:,} users")
    if row.expected is not None and row.expected.tokens_per_second / made.users < made.case.wish.speed:
        said.append("estimated slower than asked")
    if row.wider is not None:
        said.append(f"{row.wider.case.storage.name} {row.wider.said}")
    return f"{row.number}. {'; '.join(said)}"


def _lost(chosen: Chosen, rows: list[Shown], machines: int, models: int) -> Section | None:
    notes = [_loss(loss, machines, models) for loss in chosen.losses[:LOSSES]]
    if len(chosen.losses) > LOSSES:
        notes.append(f"and {len(chosen.losses) - LOSSES} further from it (--json has all)")
    numbers = {id(row.offer): row.number for row in rows}
    notes += [_beaten(each, numbers, machines) for each in chosen.beaten[:BEATEN]]
    if len(chosen.beaten) > BEATEN:
        notes.append(f"{len(chosen.beaten) - BEATEN} more are no better in anything than one of these")
    hidden = len(chosen.offers) - len(rows)
    if hidden:
        notes.append(f"{hidden} more keep what was asked: --rows N shows them")
    return Section("lost", "Next best, and why not", notes=notes) if notes else None


def _loss(loss: Loss, machines: int, models: int) -> str:
    who = [loss.case.id] if models > 1 else []
    who += [f"on {loss.place.machine.name}"] if machines > 1 else []
    return " ".join([*who, f"in {loss.case.storage.name}:", loss.said])


def _beaten(each: Beaten, numbers: dict[int, int], machines: int) -> str:
    number = numbers.get(id(each.by))
    by = f"{number}" if number else f"{each.by.case.id} in {format_of(each.by)}"
    where = f" on {machine_of(each.offer)}" if machines > 1 else ""
    return (
        f"{each.offer.case.id} in {format_of(each.offer)}{where}: {by} is as large, precise, fast and cheap, or better"
    )


def _notes(chosen: Chosen, rows: list[Shown], wish: Wish) -> list[str]:
    if not rows:
        return []
    users = "one user" if wish.users == 1 else f"{wish.users:,} users at once"
    sources = list(dict.fromkeys(row.expected.source for row in rows if row.expected is not None))
    notes = [
        f"for {users}, {short(wish.context)} context, prompts of {short(wish.prompt)}",
        "tok/s: of each user, at most (a roofline), so that prices are the least there can be; estimate: what is "
        f"expected, and its band, {'; '.join(sources) or 'unknown with experts on disk'}; users, ctx: the most of them",
    ]
    if any(row.offer.case.native for row in rows):
        notes.append("* as published; of a model's other formats the most precise that keeps what was asked")
    if any(row.offer.tiers.layout != "memory" for row in rows):
        notes.append(
            "of a model whose experts lie elsewhere the fastest format; hit rates are those of recorded routing"
        )
    return notes
