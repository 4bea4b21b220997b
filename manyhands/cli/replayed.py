"""`manyhands plan --trace`: the hit rate that a recorded routing would have under a budget."""

from pathlib import Path

from manyhands import terminal
from manyhands.errors import ConfigError
from manyhands.plan.budget import Hits
from manyhands.plan.report.ask import Ask
from manyhands.plan.report.budget import budget_and_step
from manyhands.plan.subject import Subject
from manyhands.plan.traffic import expert_bytes
from manyhands.simulate.replay import replay
from manyhands.simulate.sweep import judged
from manyhands.simulate.tokens import Tokens
from manyhands.simulate.wants import Wants
from manyhands.store.policies import Lfu
from manyhands.trace.recording import Trace

MOST_TOKENS = 20_000
"""Of a longer trace the first so many are replayed: seconds, not minutes."""


def replayed(path: Path, subject: Subject, ask: Ask) -> Hits:
    """Replay a trace of the model through `lfu`, as many sequences at once as the plan has.

    Raises `ConfigError` for a trace of another shape, and as `Trace.open` does.
    """
    trace, sizes = Trace.open(path), subject.sizes
    assert sizes is not None and ask.memory is not None
    here = (len(trace.manifest.layers), trace.manifest.num_experts, trace.manifest.num_experts_per_tok)
    there = (sizes.sparse_layers, sizes.num_experts, sizes.experts_per_token)
    if here != there:
        raise ConfigError(
            f"--trace {path}: {here[0]} layers of {here[1]} experts, {here[2]} per token; {subject.name} has "
            f"{there[0]} of {there[1]}, {there[2]} per token"
        )
    found, _ = budget_and_step(subject, ask, ask.memory)
    recorded = Tokens.of(trace, MOST_TOKENS)
    tokens = recorded.one_by_one() if ask.batch == 1 else recorded.merged(ask.batch).tokens
    one = round(expert_bytes(sizes, subject.counts, ask.storage))
    tally = judged(replay(Lfu(int(found.slots), (one,) * sizes.sparse_layers), Wants.of(tokens, (one,) * here[0])))
    source = f"{len(tokens):,} tokens of {terminal.shown(path)}, replayed (policy lfu)"
    return Hits(tally.hit_rate, tally.wanted_bytes / tally.steps, source)
