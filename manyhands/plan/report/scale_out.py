"""The section of `--scale` that goes on to thousands of devices: what a training step takes, and what limits it."""

from manyhands.format import show
from manyhands.plan.machine import Machine
from manyhands.plan.report import formulas as f
from manyhands.plan.report.ask import Ask
from manyhands.plan.report.figure import Cell, Figure, Section, Table
from manyhands.plan.report.scale import COUNTS, fabric_of, possible
from manyhands.plan.scaling import RESERVE, STATE_BYTES, Job, Step, best_step
from manyhands.plan.subject import Subject

_SIZES = (8, 64, 512, 2048, 8192)
V3_BATCH = 15_360 * 4096
"""Tokens of DeepSeek-V3's largest batch (arXiv 2412.19437 §4.2)."""


def scale_out(subject: Subject, ask: Ask, machine: Machine) -> Section | None:
    """A row per number of devices; None where the machine's matrix rate is not known, or no number will do."""
    sizes, fabric, rate = subject.sizes, fabric_of(machine, ask.network), machine.rates.get("bf16")
    assert sizes is not None
    if rate is None:
        return None
    job = Job(
        sizes,
        subject.counts,
        fabric,
        rate * ask.utilisation,
        machine.memory,
        ask.tokens_per_device,
        ask.context,
        ask.imbalance,
        ask.recorded,
    )
    E = sizes.num_experts
    shares = [ask.devices] if ask.devices else [1, *(n for n in COUNTS if possible(E, n, fabric))]
    rows: list[tuple[Cell, ...]] = []
    for devices in sorted({*_SIZES, min(fabric.node, 8), *([ask.devices] if ask.devices else [])}):
        fitting = [ep for ep in shares if devices % ep == 0 and ep <= devices]
        if fitting and fabric.whole(devices):
            rows.append(_row(best_step(job, devices, fitting), ask))
            most = devices
    if not rows:
        return None
    columns = (
        "devices",
        "ep",
        "step",
        "tokens/s",
        "efficiency",
        "exchange",
        "hidden",
        "busiest",
        "gathering",
        "memory",
    )
    notes = [
        f"training with {ask.tokens_per_device:,} tokens per device and step in sequences of {ask.context:,}, "
        f"{ask.utilisation:.0%} of the bf16 rate; of the numbers that share experts (ep) the fastest that fits",
        "exchange: there and back, forward and backward, of all layers; hidden: of it, behind the shared experts; "
        "busiest: what the busiest device computes beyond the mean; gathering: weights and gradients of what is "
        "sharded over all devices, behind the arithmetic while no tokens travel",
        f"memory: {STATE_BYTES} bytes for each parameter of a device's share (float32 master, gradient, AdamW's "
        f"moments) and two gathered blocks; activations come on top. It fits in {1 - RESERVE:.0%} of "
        f"{show(machine.memory, 'B')}",
        f"the batch grows with the devices: {most * ask.tokens_per_device / 1e6:,.1f} M tokens on {most:,}; "
        f"DeepSeek-V3's largest had {V3_BATCH / 1e6:,.1f} M",
        "behind attention too (two micro-batches in turn) more of the exchange would be hidden",
    ]
    return Section("scale_out", "Training on more devices", (), Table((*columns, "limit"), tuple(rows)), notes)


def _row(step: Step, ask: Ask) -> tuple[Cell, ...]:
    tokens = step.devices * ask.tokens_per_device
    exposed = " + ".join(f"{seconds:.4g}" for seconds in step.exposed.values())
    source = ask.recorded_source or f"busiest / mean = {ask.imbalance:g}"
    return (
        f"{step.devices:,}",
        Figure("ep", step.ep, "", None, ""),
        Figure("step", step.seconds, "s", f.STEP, f"{step.arithmetic:.4g} + {exposed}"),
        Figure("tokens/s", tokens / step.seconds, "tok/s", f.STEP, f"{tokens:,} / {step.seconds:.4g}"),
        Figure("efficiency", step.efficiency, "share", f.EFFICIENCY, f"{step.arithmetic:.4g} / {step.seconds:.4g}"),
        Figure("exchange", step.exchange, "s", f.EXCHANGE, f"ep = {step.ep}; {source}"),
        Figure("hidden", step.hidden, "s", f.STEP, "the shared experts' arithmetic, at most the exchange"),
        Figure("busiest", step.waiting, "s", f.EXPERT_TIME, source),
        Figure("gathering", step.gather, "s", f.GATHERED, f"N = {step.devices:,}, N/ep = {step.devices // step.ep:,}"),
        Figure("memory", step.held, "B", f.STATE, f"16·parameters/{step.devices:,} + 2 blocks"),
        step.limit,
    )
