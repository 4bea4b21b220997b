"""`manyhands plan --trace`: what a recorded routing would hit under a budget, and send between devices."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np

from manyhands import terminal
from manyhands.config.parallel import Layout
from manyhands.errors import ConfigError
from manyhands.plan.budget import Hits
from manyhands.plan.report.ask import Ask
from manyhands.plan.report.budget import budget_and_step
from manyhands.plan.report.scale import COUNTS, fabric_of, possible
from manyhands.plan.routes import LINKS, NET, NODE, Fabric, Recorded
from manyhands.plan.sizes import Sizes
from manyhands.plan.subject import Subject
from manyhands.plan.traffic import expert_bytes
from manyhands.simulate.exchange import exchanged
from manyhands.simulate.replay import replay
from manyhands.simulate.sweep import judged
from manyhands.simulate.tokens import Tokens
from manyhands.simulate.wants import Wants
from manyhands.store.policies import Lfu
from manyhands.trace.placement import contiguous
from manyhands.trace.recording import Trace

MOST_TOKENS = 20_000
"""Of a longer trace the first so many are replayed: seconds, not minutes."""


MOST_CURVE_TOKENS = 2_000
"""Of a trace that is replayed for every size that a choice looks at."""


def replayed(path: Path, subject: Subject, ask: Ask) -> Hits:
    """Replay a trace of the model through `lfu`, as many sequences at once as the plan has.

    Raises `ConfigError` for a trace of another shape, and as `Trace.open` does.
    """
    trace, sizes = _opened(path, subject), subject.sizes
    assert sizes is not None and ask.memory is not None
    found, _ = budget_and_step(subject, ask, ask.memory)
    recorded = Tokens.of(trace, MOST_TOKENS)
    tokens = recorded.one_by_one() if ask.batch == 1 else recorded.merged(ask.batch).tokens
    one = round(expert_bytes(sizes, subject.counts, ask.storage))
    tally = judged(
        replay(Lfu(int(found.slots), (one,) * sizes.sparse_layers), Wants.of(tokens, (one,) * sizes.sparse_layers))
    )
    source = f"{len(tokens):,} tokens of {terminal.shown(path)}, replayed (policy lfu)"
    return Hits(tally.hit_rate, tally.wanted_bytes / tally.steps, source)


def hit_curve(path: Path, subject: Subject, users: int) -> Callable[[float], float]:
    """The hit rate of any share of the experts in memory: replayed through `lfu` where it is asked for, in steps of
    an expert, as many sequences at once as there are users.

    Raises `ConfigError` for a trace of another shape, and as `Trace.open` does.
    """
    trace, sizes = _opened(path, subject), subject.sizes
    assert sizes is not None
    recorded = Tokens.of(trace, MOST_CURVE_TOKENS)
    tokens = recorded.one_by_one() if users == 1 else recorded.merged(users).tokens
    layers, experts = sizes.sparse_layers, sizes.num_experts * sizes.sparse_layers
    wants = Wants.of(tokens, (1,) * layers)

    @cache
    def of(slots: int) -> float:
        return judged(replay(Lfu(slots, (1,) * layers), wants)).hit_rate

    return lambda share: of(int(share * experts))


def on_devices(path: Path, subject: Subject, ask: Ask) -> tuple[dict[int, Recorded], str]:
    """By devices that share experts, what the trace's tokens send and compute; and where that is from.

    All tokens are one pass: a device of a plan has thousands of them. Experts lie in their order. Raises `ConfigError`
    for a trace of another shape, and as `Trace.open` does.
    """
    trace, sizes = _opened(path, subject), subject.sizes
    assert sizes is not None and ask.machine is not None
    fabric = fabric_of(ask.machine, ask.network)
    counts = [ask.devices] if ask.devices else [n for n in COUNTS if possible(sizes.num_experts, n, fabric)]
    recorded = Tokens.of(trace, MOST_TOKENS, kept=True)
    tokens = replace(recorded, step=np.zeros_like(recorded.step))
    found = {devices: _recorded(tokens, sizes, fabric, devices) for devices in counts}
    return found, f"{len(tokens):,} tokens of {terminal.shown(path)}"


def _recorded(tokens: Tokens, sizes: Sizes, fabric: Fabric, devices: int) -> Recorded:
    layout, T = Layout(1, devices), len(tokens)
    slots = contiguous(sizes.sparse_layers, sizes.num_experts, devices)
    x = exchanged(tokens, slots, layout, fabric.node)
    ways = {NODE: x.by_tokens} if x.network is None or x.links is None else {NET: x.network, LINKS: x.links}
    return Recorded(
        float(x.load_L.mean()),
        {how: float(way.remote_L.mean()) / T for how, way in ways.items()},
        {how: float(x.port_L(way, fabric.link.duplex).mean()) for how, way in ways.items()},
    )


def _opened(path: Path, subject: Subject) -> Trace:
    """Raises `ConfigError` unless the trace is of such a model."""
    trace, sizes = Trace.open(path), subject.sizes
    assert sizes is not None
    here = (len(trace.manifest.layers), trace.manifest.num_experts, trace.manifest.num_experts_per_tok)
    there = (sizes.sparse_layers, sizes.num_experts, sizes.experts_per_token)
    if here != there:
        raise ConfigError(
            f"--trace {path}: {here[0]} layers of {here[1]} experts, {here[2]} per token; {subject.name} has "
            f"{there[0]} of {there[1]}, {there[2]} per token"
        )
    return trace
