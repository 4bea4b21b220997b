"""The next token of every row that draws, each with its own settings; and what is said of it.

R rows, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from manyhands.config import SamplingConfig
from manyhands.engine.adjust import Adjuster
from manyhands.engine.mode import one_thread
from manyhands.engine.points import point
from manyhands.engine.sampling import NOT_FINITE, greedy, sample
from manyhands.errors import UserError

NOTHING_ALLOWED = (
    "no token is allowed here: the constraint, the bias, the processors and the model's vocabulary leave none"
)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """What the model alone thought of a token: log-softmax of its logits in float32, before any setting."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The most probable tokens, best first; the token's own number is the same where it is among them."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """A token, or why there is none."""

    token_id: int
    logprob: TokenLogprob | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Wish:
    """How one row draws."""

    sampling: SamplingConfig
    position: int
    """Of the token that is to come, in its sequence."""
    adjuster: Adjuster


def draw_all(logits_RV: Tensor, wishes: Sequence[Wish]) -> list[Drawn]:
    """One for each row. What is wrong with a row is that row's alone."""
    if not wishes:
        return []
    with torch.inference_mode(), one_thread():
        return _draw_all(logits_RV.float(), wishes)


def _draw_all(logits_RV: Tensor, wishes: Sequence[Wish]) -> list[Drawn]:
    errors: list[str | None] = [None] * len(wishes)
    good = logits_RV.amax(-1).isfinite()
    if not bool(good.all()):
        errors = [None if fine else NOT_FINITE for fine in good.tolist()]
        logits_RV = logits_RV.masked_fill(~good[:, None], 0.0)
    logprobs: dict[int, TokenLogprob] = {}
    raw_RV = logits_RV
    changed = [r for r, wish in enumerate(wishes) if wish.adjuster.needed and errors[r] is None]
    if changed:
        logits_RV = logits_RV.clone()
        for r in changed:
            try:
                logits_RV[r] = wishes[r].adjuster.apply(logits_RV[r])
            except Exception as error:  # of its constraint or a processor: somebody else's code
                errors[r], logits_RV[r] = broken(error), 0.0
                continue
            if not bool(logits_RV[r].amax().isfinite()):
                errors[r] = NOTHING_ALLOWED
                logits_RV[r] = 0.0
    tokens = _tokens(logits_RV, wishes)
    for r, wish in enumerate(wishes):
        if wish.sampling.logprobs is not None:
            logprobs[r] = logprobs_of(raw_RV[r : r + 1], [tokens[r]], wish.sampling.logprobs)[0]
    return [Drawn(token, logprobs.get(r), errors[r]) for r, token in enumerate(tokens)]


def broken(error: Exception) -> str:
    """What is said of a request whose constraint or processor raised."""
    if isinstance(error, UserError):
        return str(error)
    return f"the constraint or a logits processor failed: {type(error).__name__}: {error}"


def _tokens(logits_RV: Tensor, wishes: Sequence[Wish]) -> list[int]:
    """Rows with the same settings in one go: which rows those are shows in no token."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for r, wish in enumerate(wishes):
        how = wish.sampling
        key = () if greedy(how) else (how.temperature, how.top_k, how.top_p, how.min_p)
        groups.setdefault(key, []).append(r)
    tokens = [0] * len(wishes)
    for rows in groups.values():
        how = wishes[rows[0]].sampling
        points = (
            0.0
            if greedy(how)
            else [point(w.sampling.seed, w.sampling.choice, w.position) for w in map(wishes.__getitem__, rows)]
        )
        found = sample(logits_RV if len(rows) == len(wishes) else logits_RV[rows], how, points).tolist()
        for r, token in zip(rows, found, strict=True):
            tokens[r] = token
    return tokens


def logprobs_of(logits_RV: Tensor, token_ids: Sequence[int], count: int) -> list[TokenLogprob]:
    """Of a token for each row [R, V], with the `count` most probable ones of its row."""
    logprobs_RV = logits_RV.float().log_softmax(-1)
    ids_R1 = torch.tensor(token_ids, device=logits_RV.device)[:, None]
    own = logprobs_RV.gather(-1, ids_R1)[:, 0].tolist()
    if not count:
        return [TokenLogprob(token, value) for token, value in zip(token_ids, own, strict=True)]
    best = logprobs_RV.topk(min(count, logits_RV.shape[-1]), dim=-1)
    rows = zip(token_ids, own, best.indices.tolist(), best.values.tolist(), strict=True)
    return [TokenLogprob(token, value, tuple(zip(ids, values, strict=True))) for token, value, ids, values in rows]
