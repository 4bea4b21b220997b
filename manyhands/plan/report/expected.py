"""The section of what a model will really do on a machine: an estimate with its band, beside what others measured."""

from collections.abc import Sequence

from manyhands.format import show
from manyhands.plan.estimate import DECODE, PREFILL, Kind, Point, estimate
from manyhands.plan.machine import Machine
from manyhands.plan.published_speeds import PublishedSpeed, published_speeds
from manyhands.plan.recorded import format_kind
from manyhands.plan.report import formulas as f
from manyhands.plan.report.ask import Ask, short
from manyhands.plan.report.figure import Cell, Figure, Section, Table
from manyhands.plan.report.machine import decode, exceeds
from manyhands.plan.roof import Bound, prefill_bound
from manyhands.plan.subject import Subject

_KEYS = ("step", "estimate", "low", "high", "share")


def kind_of(subject: Subject, ask: Ask, machine: Machine, work: str, *, many: bool = False) -> Kind:
    """Of a step of `subject` on `machine`."""
    name = format_kind(ask.storage, sparse=subject.sizes is not None and bool(subject.sizes.num_experts))
    return Kind(work, many=many, several=machine.devices > 1, host=machine.kind == "cpu", format=name)


def expected(subject: Subject, ask: Ask, machine: Machine, recorded: Sequence[Point] = ()) -> Section | None:
    """Tokens per second of each step that fits; None where nothing fits."""
    sizes = subject.sizes
    assert sizes is not None
    rows: list[tuple[Cell, ...]] = []
    sources: list[str] = []
    energy: list[Figure] = []

    def add(step: str, bound: Bound, kind: Kind) -> None:
        found = estimate(bound, len(sizes.windows), kind, recorded)
        work = f"{bound.step.tokens} tokens in {len(sizes.windows)} layers of a·{show(bound.seconds, 's')} / layers + c"
        energy.extend(_energy(machine, step, found.tokens_per_second))
        rows.append(
            (
                step,
                Figure("tokens/s", found.tokens_per_second, "tok/s", f.EXPECTED, work),
                Figure("at the slow end", found.low, "tok/s"),
                Figure("at the fast end", found.high, "tok/s"),
                Figure("of the best speed", found.tokens_per_second / bound.tokens_per_second, "share"),
            )
        )
        sources.append(f"{step}: {found.source}")

    for batch in ask.batches:
        if exceeds(subject, ask, machine, batch) is None:
            kind = kind_of(subject, ask, machine, DECODE, many=batch > 1)
            add(f"decode, batch {batch}", decode(subject, ask, machine, batch), kind)
    bound = prefill_bound(machine, sizes, subject.counts, ask.storage, ask.prompt_length, ask.load)
    if bound.rate is not None and exceeds(subject, ask, machine, 1) is None:
        add(f"prefill, {short(ask.prompt_length)}", bound, kind_of(subject, ask, machine, PREFILL))
    if not rows:
        return None
    notes = ["; ".join(_merged(sources))]
    notes += _published([speed for speed in published_speeds() if _same(speed, subject, machine)])
    if machine.power is not None:
        notes.append(
            f"energy: every device draws its limit of {machine.power:g} W ({machine.power_source}); one that waits for "
            "memory draws less, and the computer around it comes on top"
        )
    columns = (f"on {machine.name}", "all", "from", "to", "of the best")
    return Section("expected", "Expected speed", energy, Table(columns, tuple(rows), _KEYS), notes)


def _energy(machine: Machine, step: str, speed: float) -> list[Figure]:
    """Joules of a token, where the machine's power is known."""
    if machine.power is None:
        return []
    watts = machine.power * machine.devices
    return [Figure(f"energy a token, {step}", watts / speed, "J", f.ENERGY, f"{watts:,.0f} W / {show(speed, 'tok/s')}")]


def _merged(sources: Sequence[str]) -> list[str]:
    """One line for steps that are estimated from the same speeds."""
    by: dict[str, list[str]] = {}
    for source in sources:
        step, _, what = source.partition(": ")
        by.setdefault(what, []).append(step)
    return [what if len(by) == 1 else f"{' and '.join(steps)}: {what}" for what, steps in by.items()]


def _same(speed: PublishedSpeed, subject: Subject, machine: Machine) -> bool:
    return speed.model == subject.catalogue and speed.machine == machine.name and speed.host is None


def _published(speeds: Sequence[PublishedSpeed]) -> list[str]:
    """What was published of this model on this machine, a line for each source."""
    by: dict[str, list[str]] = {}
    for speed in speeds:
        when = f", {speed.date}" if speed.date else ""
        if speed.work == DECODE:
            step = f"batch {speed.batch:,} at {speed.context:,} positions"
        else:
            step = f"prefill of {speed.batch:,} x {short(speed.context)}"
        told = f"{step} in {speed.format} {show(speed.tokens_per_second, 'tok/s')}"
        by.setdefault(f"({speed.engine}{when}) {speed.url}", []).append(told)
    return [f"measured by others: {'; '.join(steps)} {source}" for source, steps in by.items()]
