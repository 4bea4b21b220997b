"""The section of `--train-memory`: what a device holds while it trains, by optimiser."""

from manyhands.errors import ConfigError
from manyhands.format import NONE, show
from manyhands.plan.fit import shown_share, usable
from manyhands.plan.machine import Machine
from manyhands.plan.report import formulas as f
from manyhands.plan.report.ask import Ask, short
from manyhands.plan.report.figure import Cell, Figure, Section, Table
from manyhands.plan.subject import Subject
from manyhands.plan.training_memory import OPTIMIZERS, Held, held, known

_COLUMNS = ("weights", "gradients", "moments", "blocks", "activations", "together", "recomputed", "fits")
_KEYS = ("optimizer", *_COLUMNS)


def check_ep(subject: Subject, machine: Machine | None, ep: int) -> None:
    """Raises `ConfigError` for a number that cannot share out the experts, or the devices."""
    devices = 1 if machine is None else machine.devices
    if devices % ep:
        counted = f"{devices} device{'s' if devices > 1 else ''}"
        raise ConfigError(f"--ep {ep} does not divide the {counted}; --machine NAMExN says how many there are")
    experts = 0 if subject.sizes is None else subject.sizes.num_experts
    if ep > 1 and (not experts or experts % ep):
        raise ConfigError(f"--ep {ep} does not divide the {experts} experts of {subject.name}")


def training_memory(subject: Subject, ask: Ask) -> Section:
    """A row per optimiser of this package."""
    config, machine = subject.config, ask.machine
    assert config is not None
    devices, tokens = 1 if machine is None else machine.devices, ask.batch * ask.context
    rows: list[tuple[Cell, ...]] = []
    for optimizer in OPTIMIZERS:
        usual, again = (
            held(config, optimizer, tokens, devices=devices, ep=ask.ep, recompute=recompute)
            for recompute in (False, True)
        )
        shared, run = f"/ {devices}", f"T = {tokens:,}"
        rows.append(
            (
                optimizer,
                Figure("weights", usual.weights, "B", f.LASTING, f"{subject.counts.total:,} {shared}"),
                Figure("gradients", usual.gradients, "B", f.LASTING, f"{subject.counts.total:,} {shared}"),
                Figure("moments", usual.moments, "B", f.LASTING, f"{usual.moments * devices / 4:,.0f} {shared}"),
                Figure("blocks", usual.blocks, "B", f.CAST, f"ep = {ask.ep}"),
                Figure("activations", usual.activations, "B", f.KEPT, run),
                Figure("together", usual.total, "B", f.KEPT, run),
                Figure("recomputed", again.total, "B", f.RECOMPUTED, run),
                _fits(usual, again, machine),
            )
        )
    where = "one device" if machine is None else machine.title
    notes = [
        f"each device of {where}: {ask.batch} x {short(ask.context)} tokens forward and backward at once; float32 "
        f"weights, gradients and moments shared out over {devices}, ep = {ask.ep}",
        "blocks: matrices in bfloat16: of all blocks on one device (of one, recomputed), of the two gathered on "
        "several; activations: of all blocks" + (", with grouped_mm experts and even loads" if config.moe else ""),
        "recomputed: together, with train.recompute, which keeps what enters each block and one block's activations",
        "the head's and the exchange's buffers, fragmentation and the runtime come on top",
    ]
    if not known(config):
        notes.append(
            "activations are not known of latent attention, sinks, soft caps, four norms a block, networks without a "
            "gate, and routers that are no top-k: what lasts is a lower bound"
        )
    if machine is not None:
        notes.append(f"{show(usable(machine) / devices, 'B')} of a device can be used")
    return Section(
        "training_memory", "Memory of training", (), Table(("optimiser", *_COLUMNS), tuple(rows), _KEYS), notes
    )


def _fits(usual: Held, again: Held, machine: Machine | None) -> str:
    if machine is None:
        return NONE
    room = usable(machine) / machine.devices
    if usual.total is not None and usual.total <= room:
        return "yes"
    if again.total is not None and again.total <= room:
        return "recomputed"
    least = again.total or again.weights + again.gradients + again.moments + again.blocks
    return "not known" if least <= room else f"no: {shown_share(least / room)}"
