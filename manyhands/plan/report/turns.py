"""The section of two models side by side that says which of them costs less, and from where on the other does."""

from manyhands.plan.compute import forward_flops
from manyhands.plan.report.ask import Ask, short
from manyhands.plan.report.figure import Section
from manyhands.plan.subject import Subject
from manyhands.plan.traffic import decode_bytes
from manyhands.plan.turns import Cost, Stretch, stretches

CONTEXTS, BATCHES = 1 << 20, 1 << 16
"""As far as is looked."""

Side = tuple[Subject, Ask]


def turns(a: Side, b: Side) -> Section:
    """FLOPs of a decoded token by context, and bytes read for it by batch."""
    names = (a[0].name, b[0].name)
    by_context = stretches(decoding_flops(*a), decoding_flops(*b), CONTEXTS)
    context = a[1].context
    by_batch = stretches(bytes_read(*a), bytes_read(*b), BATCHES)
    notes = [
        f"fewer FLOPs per decoded token: {_told(by_context, names, 'context')}",
        f"fewer bytes read per decoded token, at {short(context)} context: {_told(by_batch, names, 'batch')}",
    ]
    return Section("turns", "Which costs less, and from where on the other", notes=notes)


def decoding_flops(subject: Subject, ask: Ask) -> Cost:
    """By context."""
    sizes = subject.sizes
    assert sizes is not None
    return lambda context: forward_flops(sizes, subject.counts, context, latent=True)


def bytes_read(subject: Subject, ask: Ask) -> Cost:
    """Per token, by batch, at the context that is asked about."""
    sizes = subject.sizes
    assert sizes is not None

    def cost(batch: int) -> float:
        step = decode_bytes(
            sizes, subject.counts, ask.storage, batch=batch, context=ask.context, kv_bits=ask.kv_bits, load=ask.load
        )
        return step.per_token

    return cost


def _told(found: list[Stretch], names: tuple[str, str], what: str) -> str:
    """`A up to batch 6, B up to batch 900, A beyond`."""

    def shown(value: int) -> str:
        return f"{value:,}" if what == "batch" else short(value)

    if len(found) == 1:
        return f"{names[found[0].smaller]}, at every {what} up to {shown(found[0].last)}"
    parts = [f"{names[each.smaller]} up to {what} {shown(each.last)}" for each in found[:-1]]
    return ", ".join([*parts, f"{names[found[-1].smaller]} beyond"])
