"""From logits to the next token: temperature, then top-k, then top-p, then min-p, then one draw.

B sequences, V vocabulary. The filters mean what transformers' logits warpers of the same names mean, in its order.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from manyhands.config import SamplingConfig
from manyhands.errors import ManyhandsError

_GREEDY_BELOW = 1e-6
"""A smaller temperature could only tell apart logits that float32 cannot, and dividing by it overflows."""


NOT_FINITE = "the model's logits are NaN or infinite: its weights are damaged or it has diverged"


def sample(logits: Tensor, config: SamplingConfig, points: Sequence[float] | float) -> Tensor:
    """Token ids [B] int64 for logits [B, V], or [] for [V]. A point in [0, 1) for each (`points.py`), or one for all.

    Of the config the temperature and the filters count. Raises `ManyhandsError` if the logits hold NaN or +inf, or
    nothing but −inf.
    """
    logits = logits.float()
    if not bool(logits.amax(-1).isfinite().all()):
        raise ManyhandsError(NOT_FINITE)
    if greedy(config):
        return logits.argmax(-1)  # the first of equals
    at = torch.tensor(points, dtype=torch.float64, device=logits.device)
    return draw(filter_logits(logits, config).softmax(-1), at.expand(logits.shape[:-1]))


def greedy(config: SamplingConfig) -> bool:
    """Whether the most probable token is taken, and no random number."""
    return config.temperature < _GREEDY_BELOW


def draw(probability: Tensor, points: Tensor) -> Tensor:
    """One of V for each row of [..., V], by inversion: at [...] points in [0, 1)."""
    reached = probability.cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(reached, points[..., None] * reached[..., -1:], right=True).squeeze(-1)


def filter_logits(logits: Tensor, config: SamplingConfig) -> Tensor:
    """[..., V] -> [..., V] float32: temperature applied, the largest moved to 0, what is filtered out at −inf."""
    logits = logits.float()
    logits = (logits - logits.amax(-1, keepdim=True)) / config.temperature
    if config.top_k is not None and config.top_k < logits.shape[-1]:
        kth = logits.topk(config.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if config.top_p < 1.0:
        logits = _top_p(logits, config.top_p)
    if config.min_p > 0.0:  # p / p_max = exp(logit − 0)
        logits = logits.masked_fill(logits < math.log(config.min_p), -math.inf)
    return logits


def _top_p(logits: Tensor, top_p: float) -> Tensor:
    """The most probable tokens of [..., V] that together reach `top_p`; of equals the first.

    Sorting a whole vocabulary costs more than a step of a small model, and nearly always a few tokens are enough.
    """
    V = logits.shape[-1]
    total = logits.logsumexp(-1, keepdim=True)
    for k in (min(512, V), V):
        values = logits.topk(k, dim=-1).values if k < V else logits.sort(dim=-1, descending=True).values
        probability = (values - total).exp()
        before = probability.cumsum(-1) - probability  # the mass of the tokens ahead of it; 0 for the first
        if k == V or bool((before[..., -1] >= top_p).all()):
            break
    kept = (before < top_p).sum(-1, keepdim=True)
    last = values.gather(-1, kept - 1)
    room = kept - (logits > last).sum(-1, keepdim=True)
    equal = logits == last
    return logits.masked_fill(~((logits > last) | (equal & (equal.cumsum(-1) <= room))), -math.inf)
