"""FLOPs per token. One multiply-add is 2 FLOP; a FLOP is an operation, never a rate.

c positions a token sees, s sequence length, H heads, d_qk and d_v the widths of a head's keys and values.
N the active parameters without the input embedding: every one of them is multiplied once per token.
"""

from manyhands.plan.count import Counts
from manyhands.plan.sizes import Sizes


def attention_flops(sizes: Sizes, context: float, *, latent: bool = False) -> float:
    """Scores and values of one token that sees `context` positions, all layers: Σ 2·min(c, window)·H·(d_qk + d_v)."""
    each = 2 * sizes.heads * (sizes.latent_score_width if latent else sizes.score_width)
    return sum(each * seen(context, window) for window in sizes.windows)


def mean_attention_flops(sizes: Sizes, length: float) -> float:
    """The same, averaged over the tokens of a causal sequence of `length`: without a window they see length / 2."""
    each = 2 * sizes.heads * sizes.score_width
    return sum(each * mean_seen(length, window, chunked=sizes.chunked) for window in sizes.windows)


def forward_flops(sizes: Sizes, counts: Counts, context: float, *, latent: bool = False) -> float:
    """Of one token that sees `context` positions: 2·N + attention (arXiv 2001.08361 §2.1).

    `latent`: as MLA decodes, from the cached latents.
    """
    return 2 * counts.active_without_embedding + attention_flops(sizes, context, latent=latent)


def training_flops(sizes: Sizes, counts: Counts, length: float) -> float:
    """Per token of a sequence of `length`, forward and backward: 3·(2·N + mean attention).

    This is the count behind DeepSeek-V3's "250 GFLOPs" at 4096 (arXiv 2505.09343, table 2).
    """
    return 3 * (2 * counts.active_without_embedding + mean_attention_flops(sizes, length))


def prefill_flops(sizes: Sizes, counts: Counts, length: float) -> float:
    """Of a whole prompt; the head runs on its last token only."""
    head = counts.active_without_embedding - counts.body
    return length * (2 * counts.body + mean_attention_flops(sizes, length)) + 2 * head


def seen(context: float, window: int | None) -> float:
    """Positions that a token sees with `context` of them there."""
    return context if window is None else min(context, window)


def mean_seen(length: float, window: int | None, *, chunked: bool = False) -> float:
    """The mean over a causal sequence; behind a window w < s it is w - w² / 2s, in chunks of w half a chunk."""
    if window is None or window >= length:
        return length / 2
    if chunked:
        whole, rest = divmod(length, window)
        return (whole * window**2 + rest**2) / (2 * length)
    return window - window**2 / (2 * length)
