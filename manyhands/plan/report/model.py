"""Sections that need only the model: parameters, FLOPs, caches, memory, bytes read."""

from manyhands.format import show
from manyhands.plan.cache import cache_bytes_per_token, sequence_bytes
from manyhands.plan.compute import attention_flops, forward_flops, mean_attention_flops, training_flops
from manyhands.plan.count import Counts
from manyhands.plan.fit import activation_bits, reserve, shown_share, usable
from manyhands.plan.report import formulas as f
from manyhands.plan.report.ask import Ask, contexts, short
from manyhands.plan.report.figure import Cell, Figure, Section, Table, Truth
from manyhands.plan.storage import BF16, INT4, INT8, Storage, weight_bytes
from manyhands.plan.subject import Subject
from manyhands.plan.traffic import decode_bytes, expert_bytes
from manyhands.plan.working import working_bytes


def parameters(subject: Subject) -> Section:
    """How many there are, by component, and how many work."""
    counts, sizes = subject.counts, subject.sizes
    active = {name: count - counts.idle.get(name, 0) for name, count in counts.by_component.items()}
    rows = tuple(
        (
            name,
            Figure(name, count, "parameters", f.COUNT, f"{count:,}"),
            Figure("share", count / counts.total, "share"),
            Figure("active", active[name], "parameters", f.ACTIVE, f"{active[name]:,}"),
        )
        for name, count in counts.by_component.items()
    )
    parts = f"{counts.total:,}"
    experts = ""
    if sizes is not None and sizes.num_experts:
        experts = f"{sizes.num_experts} experts, {sizes.experts_per_token} per token, {_layers(sizes.sparse_layers)}"
        idle = f"({sizes.num_experts} - {sizes.experts_per_token})/{sizes.num_experts}"
        parts += f" - {idle}·{counts.by_component['routed experts']:,}"
    apart = counts.active != counts.body
    with_both = "with input embedding and head" if apart else "embedding and head: none described"
    figures = [
        Figure("total", counts.total, "parameters", f.COUNT, f"{counts.total:,}", experts),
        Figure("active", counts.active, "parameters", f.ACTIVE, parts, with_both),
    ]
    if apart:
        figures += [
            Figure(
                "active, without embedding",
                counts.active_without_embedding,
                "parameters",
                f.ACTIVE,
                f"{counts.body:,} + head {counts.active_without_embedding - counts.body:,}",
                "the N of 2·N FLOPs",
            ),
            Figure(
                "active, body only",
                counts.body,
                "parameters",
                f.ACTIVE,
                f"{counts.body:,}",
                "neither embedding nor head",
            ),
        ]
    notes = [f"beside them {counts.buffers:,} selection biases, which no gradient trains"] if counts.buffers else []
    return Section("parameters", "Parameters", figures, Table(("component", "total", "share", "active"), rows), notes)


def _layers(count: int) -> str:
    return "in 1 layer" if count == 1 else f"in {count} layers"


def compute(subject: Subject, ask: Ask) -> Section:
    """FLOPs per token by context."""
    counts, sizes = subject.counts, subject.sizes
    assert sizes is not None
    n = counts.active_without_embedding
    rows: list[tuple[Cell, ...]] = []
    for c in contexts(sizes.positions, ask.context):
        scores = attention_flops(sizes, c)
        forward = Figure(
            "forward", forward_flops(sizes, counts, c), "FLOP", f.FORWARD, f"2·{n:,} + {scores:,.0f} (attention)"
        )
        row: list[Cell] = [short(c), forward, Figure("attention", scores / (forward.value or 1), "share")]
        if sizes.mla:
            latent = attention_flops(sizes, c, latent=True)
            value = forward_flops(sizes, counts, c, latent=True)
            row.append(Figure("decoding", value, "FLOP", f.LATENT, f"2·{n:,} + {latent:,.0f} (attention)"))
        value, mean = training_flops(sizes, counts, c), mean_attention_flops(sizes, c)
        row.append(Figure("training", value, "FLOP", f.TRAINING, f"3·(2·{n:,} + {mean:,.0f} (attention))"))
        rows.append(tuple(row))
    columns = ("context", "forward", "attention", *(("decoding",) if sizes.mla else ()), "training")
    notes = ["forward: one token that sees the whole context; training: forward and backward, per token of a sequence"]
    if sizes.mla:
        notes.append("decoding: MLA works on its cached latents, which costs more arithmetic and reads far less")
    if sizes.positions is not None and ask.context > sizes.positions:
        notes.append(f"the model is made for {sizes.positions:,} tokens: {ask.context:,} is beyond it")
    return Section("compute", "FLOPs per token", (), Table(columns, tuple(rows)), notes)


def cache(subject: Subject, ask: Ask) -> Section:
    """Keys and values."""
    sizes = subject.sizes
    assert sizes is not None
    growing, windowed = cache_bytes_per_token(sizes, ask.kv_bits)
    layers = len(sizes.windows)
    bounded = sum(window is not None for window in sizes.windows)
    work = f"{layers - bounded} layers·{sizes.kv_values}·{ask.kv_bits:g}/8"
    figures = [Figure("per token", growing, "B", f.CACHE, work, f"{growing:,.0f} bytes at {ask.kv_bits:g} bits")]
    if windowed:
        window = max(w for w in sizes.windows if w is not None)
        note = f"{windowed:,.0f} bytes, for the last {window:,} tokens only"
        work = f"{bounded} layers·{sizes.kv_values}·{ask.kv_bits:g}/8"
        figures.append(Figure("per token, windowed", windowed, "B", f.CACHE, work, note))
    for c in contexts(sizes.positions, ask.context):
        value = sequence_bytes(sizes, c, ask.kv_bits)
        figures.append(Figure(f"one sequence of {short(c)}", value, "B", f.CACHE, f"{c:,} tokens: {value:,.0f}"))
    return Section("cache", "Keys and values", figures)


def memory(subject: Subject, ask: Ask) -> Section:
    """Weights in several formats, with the caches of the batch, and whether that fits."""
    counts, sizes, machine = subject.counts, subject.sizes, ask.machine
    held = [BF16, INT8, INT4]
    for extra in (subject.native, ask.storage):
        held += [extra] if extra is not None and all(extra.shown() != other.shown() for other in held) else []
    caches = ask.batch * sequence_bytes(sizes, ask.context, ask.kv_bits) if sizes is not None else 0.0
    rows: list[tuple[Cell, ...]] = []
    for storage in held:
        weights = weight_bytes(counts, storage)
        native = subject.native is not None and storage.shown() == subject.native.shown()
        name = f"{storage.name} (native)" if native else storage.name
        row: list[Cell] = [name, storage.shown(), Figure("weights", weights, "B", f.WEIGHTS, _classes(counts, storage))]
        row.append(Figure("with cache", weights + caches, "B", f.WEIGHTS, f"{weights:,.0f} + {caches:,.0f} (cache)"))
        if machine is not None:
            needed = ask.need(subject, storage)
            fits = needed.fits(machine)
            row.append(Truth(fits, "yes" if fits else f"no: {shown_share(needed.share(machine))}"))
        rows.append(tuple(row))
    columns = ["format", "bits", "weights", "with cache"]
    notes = ["bits per weight, scales included: routed experts / other matrices / embedding and head / rest"]
    if sizes is not None:
        notes.append(f"cache: {ask.batch} x {short(ask.context)} tokens at {ask.kv_bits:g} bits")
    if machine is not None:
        columns.append("fits")
        notes.append(
            f"fits: with working memory, in {show(usable(machine), 'B')}: {machine.title}, less "
            f"{show(reserve(machine), 'B')}{' each' if machine.devices > 1 else ''} for system, driver and runtime"
            + (", split evenly" if machine.devices > 1 else "")
        )
    if subject.native is not None and subject.native.note.lower() not in ("", subject.native.name):
        notes.append(f"native: {subject.native.note}")
    figures = [Figure("files on disk", subject.file_bytes, "B")] if subject.file_bytes else []
    if subject.config is not None:
        bits = activation_bits(ask.storage)
        working = working_bytes(subject.config, ask.prompt_length, bits)
        label = f"working memory, prompt of {short(ask.prompt_length)}"
        note = "an estimate of this package's own engine"
        figures.append(Figure(label, working, "B", f.WORKING, f"activations of {bits:g} bits", note))
    return Section("memory", "Memory", figures, Table(tuple(columns), tuple(rows)), notes)


def _classes(counts: Counts, storage: Storage) -> str:
    return " + ".join(f"{n:,}·{storage.bits(name):g}/8" for name, n in counts.by_component.items())


def reading(subject: Subject, ask: Ask) -> Section:
    """Bytes that decoding reads, by batch."""
    counts, sizes = subject.counts, subject.sizes
    assert sizes is not None
    rows: list[tuple[Cell, ...]] = []
    for batch in ask.batches:
        step = decode_bytes(
            sizes, counts, ask.storage, batch=batch, context=ask.context, kv_bits=ask.kv_bits, load=ask.load
        )
        E, K = sizes.num_experts, sizes.experts_per_token
        formula = f.DISTINCT if ask.load is None else f.LOADED
        work = f"{E}·(1 - (1 - {K}/{E})^{batch})" if ask.load is None else f"T = {batch}"
        distinct = Figure("distinct experts", step.distinct, "", formula, work)
        total = f"{step.fixed:,.0f} + {step.experts:,.0f} (experts) + {step.cache:,.0f} (cache)"
        row: list[Cell] = [str(batch)]
        row += [distinct] if E else []
        row += [
            Figure("per step", step.total, "B", f.READ, total),
            Figure("per token", step.per_token, "B", f.READ, f"{step.total:,.0f} / {batch}"),
        ]
        rows.append(tuple(row))
    columns = ("batch", *(("experts/layer",) if sizes.num_experts else ()), "per step", "per token")
    notes = [f"decoding at {short(ask.context)} context, weights in {ask.storage.name} ({ask.storage.shown()} bits)"]
    if sizes.num_experts:
        one = Figure("", expert_bytes(sizes, counts, ask.storage), "B").shown
        routing = "uniform routing" if ask.load is None else "the recorded load"
        notes.append(f"experts that a batch touches under {routing}, of {sizes.num_experts}; one is {one}")
    return Section("reading", "Bytes read per step", (), Table(columns, tuple(rows)), notes)
