"""Models side by side, two of them with ratios: what one costs for each unit of the other's cost, by context."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from manyhands.plan.cache import cache_bytes_per_token, sequence_bytes
from manyhands.plan.compute import forward_flops, training_flops
from manyhands.plan.count_kind import router_flops, sequence_flops
from manyhands.plan.fit import shown_share
from manyhands.plan.report import formulas as f
from manyhands.plan.report.ask import CONTEXTS, Ask, short
from manyhands.plan.report.figure import Cell, Figure, Formula, Section, Table
from manyhands.plan.roof import decode_bound, prefill_bound
from manyhands.plan.sizes import Sizes
from manyhands.plan.storage import BF16, INT4, weight_bytes
from manyhands.plan.subject import Subject
from manyhands.plan.traffic import decode_bytes

Side = tuple[Subject, Ask]


_KEYS = ("first", "second", "third", "fourth", "fifth", "sixth")
"""Of the models' columns, for programs."""
MOST_SIDES = len(_KEYS)


def build_versus(*sides: Side) -> list[Section]:
    """Parameters, memory, FLOPs, bytes read and speed of each, 2 to `MOST_SIDES`; of two, the ratio beside them."""
    sections = [
        _section(
            "parameters",
            "Parameters",
            sides,
            [
                ("total", "parameters", f.COUNT, lambda s, _: s.counts.total),
                ("active", "parameters", f.ACTIVE, lambda s, _: s.counts.active),
                ("active, no embedding", "parameters", f.ACTIVE, lambda s, _: s.counts.active_without_embedding),
                ("active, body", "parameters", f.ACTIVE, lambda s, _: s.counts.body),
            ],
        ),
        _section(
            "memory",
            "Weights",
            sides,
            [
                ("bf16", "B", f.WEIGHTS, lambda s, _: weight_bytes(s.counts, BF16)),
                ("int4 (4.5 bits)", "B", f.WEIGHTS, lambda s, _: weight_bytes(s.counts, INT4)),
                ("native", "B", f.WEIGHTS, lambda s, _: weight_bytes(s.counts, s.native) if s.native else None),
            ],
            [f"{subject.name} is published in {subject.native.name}" for subject, _ in sides if subject.native],
        ),
    ]
    if all(subject.pairs is not None for subject, _ in sides):
        sections.append(_of_a_pair(sides))
    if any(subject.sizes is None for subject, _ in sides):
        return sections
    return [*sections, *_by_context(sides), _turns(sides), *_on_machine(sides)]


def _turns(sides: Sequence[Side]) -> Section:
    """The first against each other one."""
    from manyhands.plan.report.turns import turns

    first = sides[0][0].name
    found = [(other[0].name, turns(sides[0], other)) for other in sides[1:]]
    if len(found) == 1:
        return found[0][1]
    notes = [f"{first} and {name}: {note}" for name, section in found for note in section.notes]
    return replace(found[0][1], notes=notes)


Measure = Callable[[Subject, Ask], float | None]
Row = tuple[str, str, Formula, Measure]


def _section(key: str, title: str, sides: Sequence[Side], rows: list[Row], notes: list[str] | None = None) -> Section:
    names = [subject.name for subject, _ in sides]
    ratios = len(sides) == 2
    cells: list[tuple[Cell, ...]] = []
    for label, unit, formula, measure in rows:
        values = [measure(subject, ask) for subject, ask in sides]
        row: list[Cell] = [label]
        for name, value in zip(names, values, strict=True):
            row.append(Figure(name, value, unit, formula, f"{value:,.6g}" if value is not None else ""))
        if ratios:
            left, right = values
            ratio = left / right if left is not None and right else None
            row.append(Figure("ratio", ratio, "x", f.RATIO, f"{left:.6g} / {right:.6g}" if ratio else ""))
        cells.append(tuple(row))
    last = ("ratio",) if ratios else ()
    table = Table(("", *names, *last), tuple(cells), ("figure", *_KEYS[: len(sides)], *last))
    return Section(key, title, (), table, notes or [])


def _sizes(subject: Subject) -> Sizes:
    assert subject.sizes is not None
    return subject.sizes


def _by_context(sides: Sequence[Side]) -> list[Section]:
    flops: list[Row] = []
    latent: list[Row] = []
    caches: list[Row] = [
        ("per token", "B", f.CACHE, lambda s, q: sum(cache_bytes_per_token(_sizes(s), q.kv_bits))),
    ]
    reads: list[Row] = []
    for c in CONTEXTS:
        flops.append(("forward, " + short(c), "FLOP", f.FORWARD, _forward(c, latent=False)))
        latent.append(("decoding, " + short(c), "FLOP", f.LATENT, _forward(c, latent=True)))
        caches.append((f"one sequence of {short(c)}", "B", f.CACHE, _cache(c)))
        reads += [(f"batch {n}, {short(c)}", "B", f.READ, _read(c, n)) for n in (1, 64)]
    if any(_sizes(subject).mla for subject, _ in sides):
        flops += latent
    flops.append(
        ("training, 4k", "FLOP", f.TRAINING, lambda s, _: training_flops(_sizes(s), s.counts, 4096)),
    )
    beyond = [
        f"{s.name} is made for {s.sizes.positions:,} tokens"
        for s, _ in sides
        if s.sizes and s.sizes.positions and s.sizes.positions < CONTEXTS[-1]
    ]
    held = (" and " if len(sides) == 2 else ", ").join(
        f"{subject.name} in {ask.storage.name}" for subject, ask in sides
    )
    return [
        _section("compute", "FLOPs per token", sides, flops, beyond),
        _section("cache", "Keys and values", sides, caches),
        _section(
            "reading", "Bytes read per decoded token", sides, sorted(reads, key=lambda row: row[0].split()[1]), [held]
        ),
    ]


def _of_a_pair(sides: Sequence[Side]) -> Section:
    from manyhands.plan.report.pairs import PUBLISHED

    def forward(s: Subject, _: Ask) -> float | None:
        return sequence_flops(s.pairs, *PUBLISHED) if s.pairs else None

    def with_routers(s: Subject, _: Ask) -> float | None:
        return sequence_flops(s.pairs, *PUBLISHED) + router_flops(s.pairs, *PUBLISHED) if s.pairs else None

    rows: list[Row] = [
        ("without routers", "FLOP", f.PAIR, forward),
        ("with routers", "FLOP", f.PAIR_ROUTERS, with_routers),
    ]
    return _section("compute", "FLOPs per pair of sequences, {} in and {} out".format(*PUBLISHED), sides, rows)


def _on_machine(sides: Sequence[Side]) -> list[Section]:
    ask = sides[0][1]
    machine = ask.machine
    if machine is None:
        return []
    rows: list[Row] = [(f"decode, batch {n}", "tok/s", f.ROOF, _decode(n)) for n in ask.batches]
    rows.append((f"prefill, {short(ask.prompt_length)}", "tok/s", f.ROOF, _prefill))
    notes = [f"an upper bound on {machine.title}, at {short(ask.context)} context"]
    for subject, asked in sides:
        need = asked.need(subject)
        if not need.fits(machine):
            much = shown_share(need.share(machine))
            notes.append(f"{subject.name} does not fit: it needs {much} what can be used of the memory")
    return [_section("speed", "Best speed, all sequences", sides, rows, notes)]


def _forward(context: int, *, latent: bool) -> Measure:
    return lambda s, _: forward_flops(_sizes(s), s.counts, context, latent=latent)


def _cache(context: int) -> Measure:
    return lambda s, q: sequence_bytes(_sizes(s), context, q.kv_bits)


def _read(context: int, batch: int) -> Measure:
    def measure(s: Subject, q: Ask) -> float:
        step = decode_bytes(_sizes(s), s.counts, q.storage, batch=batch, context=context, kv_bits=q.kv_bits)
        return step.per_token

    return measure


def _decode(batch: int) -> Measure:
    def measure(s: Subject, q: Ask) -> float | None:
        if q.machine is None or not q.need(s, batch=batch).fits(q.machine):
            return None
        bound = decode_bound(
            q.machine, _sizes(s), s.counts, q.storage, batch=batch, context=q.context, kv_bits=q.kv_bits
        )
        return bound.tokens_per_second

    return measure


def _prefill(s: Subject, q: Ask) -> float | None:
    if q.machine is None or not q.need(s, batch=1).fits(q.machine):
        return None
    bound = prefill_bound(q.machine, _sizes(s), s.counts, q.storage, q.prompt_length)
    return bound.tokens_per_second if bound.rate is not None else None
