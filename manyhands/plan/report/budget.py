"""The section that forecasts decoding with experts on disk, in a process of so many bytes."""

from dataclasses import replace

from manyhands.format import show
from manyhands.plan.budget import HITS_SOURCE, Budget, budget_of, expected_hits, token_rate
from manyhands.plan.report import formulas as f
from manyhands.plan.report.ask import Ask, short
from manyhands.plan.report.figure import Figure, Section
from manyhands.plan.subject import Subject
from manyhands.plan.traffic import StepBytes, decode_bytes


def budget_and_step(subject: Subject, ask: Ask, memory: float) -> tuple[Budget, StepBytes]:
    """What a process of so many bytes has room for, and what a step reads; as recorded, where that is known."""
    counts, sizes = subject.counts, subject.sizes
    assert sizes is not None
    step = decode_bytes(
        sizes, counts, ask.storage, batch=ask.batch, context=ask.context, kv_bits=ask.kv_bits, load=ask.load
    )
    if ask.hits is not None:
        step = replace(step, experts=ask.hits.step, distinct=step.distinct * ask.hits.step / step.experts)
    return budget_of(memory, counts, sizes, ask.storage, ask.need(subject), step), step


def budget(subject: Subject, ask: Ask, memory: float) -> Section:
    """What fits, the hit rate, bytes from the disk, tokens per second."""
    machine, disk = ask.machine, ask.disk_rate
    assert disk is not None
    found, step = budget_and_step(subject, ask, memory)
    title = f"Experts on disk, in a process of {show(memory, 'B')}"
    rest = Figure("all but experts", found.rest, "B", f.REST, "", "the process too")
    notes = [
        f"{'one sequence' if ask.batch == 1 else f'{ask.batch} sequences in step'}, {short(ask.context)} context, "
        f"weights in {ask.storage.name} ({ask.storage.shown()} bits)"
    ]
    if not found.works:
        notes.append(
            f"too little: a step's experts of one layer, {show(found.layer, 'B')}, must be in memory together: "
            f"--memory {show(found.smallest, 'B').replace(' ', '')} is the least that works"
        )
        speed = Figure("tokens/s", None, "tok/s", f.OVERLAP)
        return Section("budget", title, [rest, speed], notes=notes)
    hits, known = (expected_hits(found.share), "assumed") if ask.hits is None else (ask.hits.rate, "replayed")
    notes.append(f"hit rate: {HITS_SOURCE if ask.hits is None else ask.hits.source}")
    missed = (1 - hits) * step.experts
    bandwidth = machine.all_bandwidth if machine is not None else None
    from_disk = ask.batch / (missed / disk) if missed else None
    from_memory = ask.batch / (step.total / bandwidth) if bandwidth else None
    rate = token_rate(step, hits, disk, bandwidth) if from_disk or from_memory else None
    limit = "memory" if from_memory and (from_disk is None or from_memory <= from_disk) else "the disk"
    work = f"{ask.batch} / max({step.total:,.0f} / {show(bandwidth, 'B/s')}, {missed:,.0f} / {show(disk, 'B/s')})"
    figures = [
        rest,
        Figure("left for experts", found.slots, "B", f.SLOTS, f"{memory:,.0f} - {found.rest:,.0f}", "the slots"),
        Figure("of all experts", found.share, "share", f.SLOTS, f"{found.slots:,.0f} / {found.routed:,.0f}"),
        Figure("experts of one step", step.experts, "B", f.READ, f"{step.distinct:.4g} a layer"),
        Figure("hit rate", hits, "share", f.HITS, f"{found.share:.4g} of the experts", known),
        Figure("from disk, per token", missed / ask.batch, "B", f.MISSED, f"(1 - {hits:.4g})·{step.experts:,.0f}"),
        Figure("disk reads", disk, "B/s", note=ask.disk_source),
        Figure("tokens/s, the disk alone", from_disk, "tok/s", f.OVERLAP, work),
        Figure("tokens/s, memory alone", from_memory, "tok/s", f.OVERLAP, work),
        Figure(
            "tokens/s", rate, "tok/s", f.OVERLAP, work, f"an upper bound, set by {limit}" if rate else "all experts fit"
        ),
    ]
    if found.slots < step.experts:
        notes.append(
            f"less than one step's experts fit ({show(step.experts, 'B')}): every token waits for the disk; from "
            f"--memory {show(found.rest + step.experts, 'B').replace(' ', '')} on fewer would"
        )
    if ask.batch > 1 and ask.hits is None:
        notes.append("the hit rate was recorded with one sequence; several in step share experts within it already")
    if bandwidth is None:
        notes.append("what memory allows is not known: --machine here measures it")
    return Section("budget", title, figures, notes=notes)
