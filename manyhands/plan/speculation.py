"""Speculative decoding: what guessing ahead gains, by how many tokens a step is accepted to give.

A step of B sequences drafts d tokens for each, checks them in one pass over B·(1 + d) tokens, and keeps a of them on
average, that of the pass itself included: a / (pass + d drafts) tokens per second and sequence. The pass reads each
cache once, and the experts that all its tokens want. A draft is a pass of B tokens through one more block and the head
(multi-token prediction, arXiv 2412.19437 §2.2, one module used d times), or free where text is looked up.
Source: Leviathan, Kalman, Matias, arXiv 2211.17192 §3.3.
"""

from dataclasses import dataclass, replace

from manyhands.errors import ConfigError
from manyhands.plan.compute import attention_flops, forward_flops
from manyhands.plan.count import Counts
from manyhands.plan.estimate import Law
from manyhands.plan.machine import Machine
from manyhands.plan.roof import Bound, bound_of
from manyhands.plan.sizes import Sizes
from manyhands.plan.storage import Storage
from manyhands.plan.traffic import Load, decode_bytes

MOST_DRAFTS = 64


@dataclass(frozen=True, slots=True)
class Guessing:
    """What a step is made of."""

    drafts: int
    """d."""
    accepted: float
    """a, from 1 to d + 1."""
    check: Bound
    """The pass over B·(1 + d) tokens."""
    draft: Bound | None
    """One draft of all B; None: it costs nothing."""
    layers: int

    @property
    def sequences(self) -> int:
        """B."""
        return self.check.step.tokens // (1 + self.drafts)

    @property
    def seconds(self) -> float:
        """The least that a step takes."""
        return self.check.seconds + (self.drafts * self.draft.seconds if self.draft else 0.0)

    def expected_seconds(self, law: Law) -> float:
        """A step by what measured speeds say of a layer; a draft is one."""
        check = self.layers * law.seconds(self.check.seconds / self.layers)
        return check + (self.drafts * law.seconds(self.draft.seconds) if self.draft else 0.0)

    def speed(self, seconds: float) -> float:
        """Tokens per second of all sequences, where a step takes so long."""
        return self.accepted * self.sequences / seconds


def read_accepted(text: str, drafts: int) -> float:
    """`2.82` tokens a step, or `85%`: the chance of each draft. Raises `ConfigError` for what no step can give."""
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = 0.0
    value = of_chance(value / 100, drafts) if text.endswith("%") and 0 < value <= 100 else value
    if not 1 <= value <= drafts + 1:
        raise ConfigError(
            f"--accepted {text}: expected the tokens a step gives, 1 to {drafts + 1} with --speculate {drafts}, or the "
            "chance of each draft, such as 85%"
        )
    return value


def of_chance(chance: float, drafts: int) -> float:
    """Mean tokens of a step where each draft is right with this chance, given those before: (1 - p^(d+1)) / (1 - p)."""
    return float(sum(chance**n for n in range(drafts + 1)))


def guessing(
    machine: Machine,
    sizes: Sizes,
    counts: Counts,
    storage: Storage,
    drafts: int,
    accepted: float,
    *,
    batch: int = 1,
    context: float = 0,
    kv_bits: float = 16,
    load: Load | None = None,
    module: Storage | None = None,
) -> Guessing:
    """A step of `batch` sequences that see `context` positions.

    `module`: how the block that drafts is held; None: drafts cost nothing.
    """
    tokens = batch * (1 + drafts)
    one = decode_bytes(sizes, counts, storage, batch=batch, context=context, kv_bits=kv_bits, load=load)
    step = decode_bytes(sizes, counts, storage, batch=tokens, context=context, kv_bits=kv_bits, load=load)
    step = replace(step, cache=one.cache)  # the tokens of a sequence read its cache together
    flops, scores = forward_flops(sizes, counts, context, latent=True), attention_flops(sizes, context, latent=True)
    check = bound_of(machine, sizes, storage, step, tokens * flops, tokens * scores)
    draft = None
    if module is not None:
        draft = _module(machine, sizes, counts, module, batch, context, kv_bits, load)
    return Guessing(drafts, accepted, check, draft, len(sizes.windows))


def _module(
    machine: Machine,
    sizes: Sizes,
    counts: Counts,
    storage: Storage,
    batch: int,
    context: float,
    kv_bits: float,
    load: Load | None,
) -> Bound:
    """One mean block with experts, the projection of 2·D to D, and the head."""
    L, D = len(sizes.windows), sizes.hidden_size
    step = decode_bytes(sizes, counts, storage, batch=batch, context=context, kv_bits=kv_bits, load=load)
    head = counts.active_without_embedding - counts.body
    head_bytes = head * storage.bits("head" if "head" in counts.by_component else "embedding") / 8
    sparse = max(1, sizes.sparse_layers)
    projection = 2 * D * D
    ends = head_bytes + batch * D * storage.embedding / 8  # a row of the embedding for each token
    other = (step.fixed - ends) / L + ends + projection * storage.linear / 8
    step = replace(step, experts=step.experts / sparse, fixed=other, cache=step.cache / L)
    scores = attention_flops(sizes, context, latent=True) / L
    flops = 2 * (counts.body / L + head + projection) + scores
    bound = bound_of(machine, sizes, storage, step, batch * flops, batch * scores)
    return replace(bound, wait_seconds=bound.wait_seconds / L)
