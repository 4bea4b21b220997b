"""Sections that need a machine or a price: the best speed, experts on disk, money, training."""

from manyhands.format import show
from manyhands.plan.compute import training_flops
from manyhands.plan.fit import shown_share, usable
from manyhands.plan.machine import Machine
from manyhands.plan.offload import HIT_RATES, offload_seconds, resident_share, routed_bytes
from manyhands.plan.price import device_hours, price_per_million, utilisation
from manyhands.plan.report import formulas as f
from manyhands.plan.report.ask import Ask, short
from manyhands.plan.report.figure import Cell, Figure, Section, Table
from manyhands.plan.roof import LINK_LATENCY, NETWORK_LATENCY, Bound, decode_bound, prefill_bound
from manyhands.plan.subject import Subject
from manyhands.plan.traffic import decode_bytes


def speed(subject: Subject, ask: Ask, machine: Machine) -> Section:
    """The best tokens per second and time to the first token, with what limits each."""
    counts, sizes = subject.counts, subject.sizes
    assert sizes is not None
    rows: list[tuple[Cell, ...]] = []
    for batch in ask.batches:
        if (too_much := exceeds(subject, ask, machine, batch)) is not None:
            nothing = Figure("tokens/s", None, "tok/s"), Figure("each sequence", None, "tok/s")
            rows.append((f"decode, batch {batch}", *nothing, too_much))
            continue
        bound = decode(subject, ask, machine, batch)
        rows.append(
            (
                f"decode, batch {batch}",
                Figure("tokens/s", bound.tokens_per_second, "tok/s", f.ROOF, _working(bound, machine)),
                Figure(
                    "each sequence",
                    bound.tokens_per_second / batch,
                    "tok/s",
                    f.ROOF,
                    f"{bound.tokens_per_second:.4g} / {batch}",
                ),
                bound.limit,
            )
        )
    bound = prefill_bound(machine, sizes, counts, ask.storage, ask.prompt_length, ask.load)
    too_much = exceeds(subject, ask, machine, 1)
    known, work = bound.rate is not None and too_much is None, _working(bound, machine)
    rows.append(
        (
            f"prefill, {short(ask.prompt_length)}",
            Figure("tokens/s", bound.tokens_per_second if known else None, "tok/s", f.ROOF, work),
            Figure("first token", bound.seconds if known else None, "s", f.ROOF, work, key="first token"),
            bound.limit if known else too_much or "matrix rate unknown",
        )
    )
    rates = ", ".join(f"{name} {show(rate, 'FLOP/s')}" for name, rate in machine.rates.items()) or "matrix rate unknown"
    wait = LINK_LATENCY if machine.devices <= machine.node else NETWORK_LATENCY
    notes = [
        f"{machine.title}: {show(machine.memory, 'B')}, reads {show(machine.bandwidth, 'B/s')}, {rates}"
        + (" (each)" if machine.devices > 1 else ""),
        f"source: {machine.source}",
        f"an upper bound: weights in {ask.storage.name}, {short(ask.context)} context, nothing lost"
        + (
            f" to communication but its latency: two collectives per layer of {show(wait, 's')} each, assumed"
            if machine.devices > 1
            else ""
        ),
    ]
    notes += _routing(subject, ask, machine)
    need = ask.need(subject, batch=max(ask.batches))
    if not need.fits(machine):
        notes.append(
            f"no speed for what does not fit: batch {max(ask.batches)} needs {show(need.weights, 'B')} of weights, "
            f"{show(need.cache, 'B')} of cache and {show(need.working, 'B')} of working memory; "
            f"{show(usable(machine), 'B')} can be used"
        )
    columns = (f"on {machine.name}", "all", "each / first", "limited by")
    return Section("speed", "Best speed", (), Table(columns, tuple(rows), _SPEED_KEYS), notes)


_SPEED_KEYS = ("step", "all", "each", "limited by")


def _routing(subject: Subject, ask: Ask, machine: Machine) -> list[str]:
    """What a batch of a sparse model reads depends on its tokens."""
    held = [batch for batch in ask.batches if batch > 1 and exceeds(subject, ask, machine, batch) is None]
    if not held or subject.sizes is None or not subject.sizes.num_experts:
        return []
    most = decode(subject, ask, machine, max(held)).most_per_second
    routed = "were routing uniform" if ask.load is None else "with the load that was recorded"
    alike = f"were all tokens sent to the same experts, batch {max(held)} could reach {show(most, 'tok/s')}"
    return [f"batches: {routed}; {alike}"]


def decode(subject: Subject, ask: Ask, machine: Machine, batch: int) -> Bound:
    """One step of a batch."""
    assert subject.sizes is not None
    return decode_bound(
        machine,
        subject.sizes,
        subject.counts,
        ask.storage,
        batch=batch,
        context=ask.context,
        kv_bits=ask.kv_bits,
        load=ask.load,
    )


def exceeds(subject: Subject, ask: Ask, machine: Machine, batch: int) -> str | None:
    """Why there is no speed: the batch does not fit. None: it fits."""
    need = ask.need(subject, batch=batch)
    return None if need.fits(machine) else f"does not fit: {shown_share(need.share(machine))}"


def _working(bound: Bound, machine: Machine) -> str:
    read = f"{bound.step.total:,.0f} B / {show(machine.all_bandwidth, 'B/s')} = {show(bound.read_seconds, 's')}"
    if bound.rate is None:
        return f"{read}; matrix rate unknown"
    weights = f"{bound.flops - bound.attention:,.0f} FLOP / {show(bound.rate[1], 'FLOP/s')}"
    scores = f"{bound.attention:,.0f} FLOP of attention / {show(bound.scores[1] if bound.scores else None, 'FLOP/s')}"
    arithmetic = f"{weights} + {scores} = {show(bound.compute_seconds, 's')}"
    wait = f", {show(bound.wait_seconds, 's')} of latency" if bound.wait_seconds else ""
    return f"{bound.step.tokens} tokens / max({read}, {arithmetic}{wait})"


def offload(subject: Subject, ask: Ask, machine: Machine) -> Section:
    """Tokens per second of the batch that is asked about, against the hit rate of an expert cache."""
    counts, sizes, disk = subject.counts, subject.sizes, ask.disk_rate
    assert sizes is not None and disk is not None
    step = decode_bytes(
        sizes, counts, ask.storage, batch=ask.batch, context=ask.context, kv_bits=ask.kv_bits, load=ask.load
    )
    need = ask.need(subject)
    share = resident_share(machine, counts, ask.storage, need)
    floor = need.total - routed_bytes(counts, ask.storage)
    held = floor <= usable(machine)
    rows: list[tuple[Cell, ...]] = []
    for hit in HIT_RATES:
        slow = offload_seconds(step, hit, machine.all_bandwidth, disk)
        fast = offload_seconds(step, hit, machine.all_bandwidth, disk, overlap=True)
        missed = (1 - hit) * step.experts
        memory = show(machine.all_bandwidth, "B/s")
        work = f"{ask.batch} / ({step.total - missed:,.0f} / {memory} + {missed:,.0f} / {show(disk, 'B/s')})"
        rows.append(
            (
                f"{hit:.0%}",
                Figure("read from disk", missed, "B", f.OFFLOAD, f"(1 - {hit:g})·{step.experts:,.0f}"),
                Figure("one after the other", ask.batch / slow if held else None, "tok/s", f.OFFLOAD, work),
                Figure(
                    "all overlapped",
                    ask.batch / fast if held else None,
                    "tok/s",
                    f.OVERLAP,
                    f"{ask.batch} / {fast:.4g} s",
                ),
            )
        )
    figures = [
        Figure("experts that fit in memory", share, "share", f.RESIDENT, "", "the hit rate, were routing uniform"),
        Figure("disk reads", disk, "B/s", note=ask.disk_source),
    ]
    columns = ("hit rate", "from disk", "in turn", "overlapped")
    many = "one sequence" if ask.batch == 1 else f"{ask.batch} sequences in step, all together"
    notes = [f"{many}, {short(ask.context)} context, weights in {ask.storage.name} on {machine.title}"]
    if not held:
        notes.append(
            f"no speed: without experts {show(floor, 'B')} are needed, and {show(usable(machine), 'B')} can be used"
        )
    return Section("offload", "Experts on disk", figures, Table(columns, tuple(rows)), notes)


def money(subject: Subject, ask: Ask, machine: Machine, price: float) -> Section:
    """What a million tokens cost on a machine that is never idle."""
    hourly = price * machine.devices
    figures: list[Figure] = []
    left_out = []
    for batch in ask.batches:
        if (too_much := exceeds(subject, ask, machine, batch)) is not None:
            left_out.append(f"batch {batch} has no price: {too_much}")
            figures.append(Figure(f"10^6 tokens out, batch {batch}", None, "USD", f.PRICE))
            continue
        rate = decode(subject, ask, machine, batch).tokens_per_second
        work = f"{hourly:g} / 3600 / {rate:.4g}·10^6"
        value = price_per_million(hourly, rate)
        figures.append(Figure(f"10^6 tokens out, batch {batch}", value, "USD", f.PRICE, work))
    assert subject.sizes is not None
    length, together = ask.prompt_length, prompts_together(subject, ask, machine)
    for prompts in sorted({1, together}) if together else ():
        bound = prefill_bound(machine, subject.sizes, subject.counts, ask.storage, length, ask.load, prompts=prompts)
        if bound.rate is not None:
            rate = bound.tokens_per_second
            work = f"{hourly:g} / 3600 / {rate:.4g}·10^6"
            label = f"10^6 tokens in, {prompts} x {short(length)}"
            figures.append(Figure(label, price_per_million(hourly, rate), "USD", f.PRICE, work))
    notes = [
        f"at {hourly:g} USD per hour ({machine.devices} x {price:g}), never idle, at best speed: a lower bound",
        f"in: so many prompts in one pass; they are read together up to {TOGETHER:,} tokens, as far as they fit",
    ]
    return Section("price", "Price of a million tokens", figures, notes=notes + left_out)


TOGETHER = 16384
"""Tokens of prompts that share a pass: where arithmetic, not reading weights, is what a pass costs."""


def prompts_together(subject: Subject, ask: Ask, machine: Machine) -> int:
    """Prompts in one pass: up to `TOGETHER` tokens that fit; 0 if not even one does."""
    prompts = max(1, TOGETHER // ask.prompt_length)
    while prompts and not ask.passes(subject, prompts).fits(machine):
        prompts //= 2
    return prompts


def training(subject: Subject, ask: Ask) -> Section:
    """FLOPs, device hours, cost."""
    assert subject.sizes is not None and ask.tokens is not None
    each = training_flops(subject.sizes, subject.counts, ask.context)
    flops = each * ask.tokens
    work = f"{each:,.0f}·{ask.tokens:,.0f}"
    figures = [
        Figure("per token", each, "FLOP", f.TRAINING, f"at {ask.context} tokens"),
        Figure("in total", flops, "FLOP", f.TRAIN_TOTAL, work, f"{show(ask.tokens, 'tokens')} tokens"),
    ]
    hours, rate = ask.hours, ask.machine.rates.get("bf16") if ask.machine is not None else None
    if rate is not None and ask.machine is not None:
        name = ask.machine.title if ask.machine.devices == 1 else f"each of {ask.machine.title}"
        if hours is not None:
            share = utilisation(flops, rate, hours)
            work = f"{flops:.4g} / ({rate:.4g}·{hours:,.0f}·3600)"
            figures.append(Figure("utilisation", share, "share", f.MFU, work, f"of the bf16 rate of {name}"))
        else:
            hours = device_hours(flops, rate, ask.utilisation)
            work = f"{flops:.4g} / ({rate:.4g}·{ask.utilisation:g}) / 3600"
            note = f"at {ask.utilisation:.0%} of the bf16 rate of {name}"
            figures.append(Figure("device hours", hours, "h", f.HOURS, work, note))
        if ask.machine.devices > 1:
            figures.append(
                Figure("wall clock", hours / ask.machine.devices * 3600, "s", f.HOURS, f"/ {ask.machine.devices}")
            )
    if hours is not None and ask.price is not None:
        work = f"{hours:,.0f} h·{ask.price:g} USD"
        figures.append(
            Figure("cost", hours * ask.price, "USD", f.COST, work, "this run only: no trials, no data, no staff")
        )
    notes = [] if hours is not None else ["give --machine for device hours, and --price for the cost"]
    return Section("training", "Training", figures, notes=notes)
