"""How many distinct experts tokens want together: what serving several sequences at once saves."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from manyhands.simulate.tokens import Tokens
from manyhands.simulate.wants import Array

BATCHES = (1, 2, 4, 8, 16, 32)
_DRAWS = 200


@dataclass(frozen=True)
class Union:
    """B tokens in one pass: distinct experts of all layers, and bytes of experts per token relative to B = 1."""

    batch: int
    experts_per_step: float
    bytes_per_token: float


def union_curve(tokens: Tokens, record_bytes: Sequence[int], num_experts: int, seed: int = 0) -> list[Union]:
    """For B of `BATCHES` (as far as there are tokens): the mean of 200 draws of B decoded tokens.

    Each draw takes its tokens from as many different texts as there are; of one text, without repeating a token.
    Tokens of one text share more experts than those of different ones.
    """
    alone = tokens.one_by_one()
    rng = np.random.default_rng(seed)
    texts = [np.flatnonzero(alone.sequence == number) for number in np.unique(alone.sequence)]
    sizes = np.asarray(record_bytes, np.float64)
    found: list[Union] = []
    for batch in (size for size in BATCHES if size <= len(alone)):
        experts, bytes_ = 0.0, 0.0
        for _ in range(_DRAWS):
            wanted_LE = np.zeros((len(sizes), num_experts + 1), np.bool_)
            ids_BLK = np.minimum(alone.expert_ids[_draw(texts, batch, rng)].astype(np.int64), num_experts)
            wanted_LE[np.arange(len(sizes))[None, :, None], ids_BLK] = True
            count_L = wanted_LE[:, :num_experts].sum(-1)
            experts += float(count_L.sum()) / _DRAWS
            bytes_ += float(count_L @ sizes) / batch / _DRAWS
        found.append(Union(batch, experts, bytes_))
    return [replace(one, bytes_per_token=one.bytes_per_token / found[0].bytes_per_token) for one in found]


def _draw(texts: list[Array], batch: int, rng: np.random.Generator) -> Array:
    """`batch` different tokens, dealt over as many texts as there are."""
    chosen = rng.choice(len(texts), min(batch, len(texts)), replace=False)
    shares = [batch // len(chosen) + (i < batch % len(chosen)) for i in range(len(chosen))]
    drawn = np.concatenate(
        [
            rng.choice(texts[text], min(share, len(texts[text])), replace=False)
            for text, share in zip(chosen, shares, strict=True)
        ]
    )
    if len(drawn) < batch:  # a text was too short for its share
        others = np.setdiff1d(np.concatenate(texts), drawn)
        drawn = np.concatenate([drawn, rng.choice(others, batch - len(drawn), replace=False)])
    return drawn
