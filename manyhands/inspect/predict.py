"""Can a token's experts be foretold? Recall@K of several predictors, each learned on other texts than it is asked on.

    constant          the K busiest experts
    token id          the K experts that most often took this token id
    previous layer    the K experts most often seen with those of the sparse layer below
    previous token    the experts of the token before, in the same layer
    router early      the layer's own router, applied before that layer's attention has been added (needs the model)

T tokens   E experts   K experts per token
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manyhands.inspect.observed import Floats, Ints, Observed, chosen, overlap
from manyhands.inspect.resample import Figure, Resampler

_PRIOR = 1.0
"""Tokens' worth of the overall loads that every count begins with."""
Predict = Callable[[NDArray[np.bool_], NDArray[np.bool_]], Floats]
"""From the tokens learned on and those asked about (masks [T]), a score [asked, E]."""


def predictability(seen: Observed, layer: int, sampled: Resampler) -> dict[str, Figure]:
    """Recall@K by predictor. `shuffled` is K/E, chance; `random`, the same predictor of the random routers' experts."""
    E, K = seen.num_experts, seen.experts_per_token
    variants = seen.variants(layer)
    folds = _folds(seen)
    found: dict[str, Figure] = {}

    def add(name: str, recalls: list[Floats]) -> None:
        found[name] = sampled.mean(recalls, min(1.0, K / E))

    add("constant", [_recall(ids, folds, _constant(ids, E)) for ids in variants])
    if (seen.token_ids >= 0).any():
        _, compact = np.unique(seen.token_ids, return_inverse=True)
        add("token id", [_recall(ids, folds, _by_label(ids, compact, E)) for ids in variants])
    if layer > 0:
        below = seen.variants(layer - 1)
        each = zip(variants, below, strict=True)
        add("previous layer", [_recall(ids, folds, _by_experts(ids, under, E)) for ids, under in each])
    add("previous token", [_before(ids, seen) for ids in variants])
    if seen.early_ids is not None:
        add("router early", [overlap(variants[0], seen.early_ids[:, layer])])
    return found


def _folds(seen: Observed) -> list[NDArray[np.bool_]]:
    """Two halves of the texts of each domain, at random."""
    texts = int(seen.text.max()) + 1
    half = np.random.default_rng(0).permutation(texts) % 2
    return [half[seen.text] == 0, half[seen.text] == 1]


def _recall(ids_TK: NDArray[Any], folds: list[NDArray[np.bool_]], predict: Predict) -> Floats:
    """[T]: of each token's experts, the share among as many that are predicted."""
    K = ids_TK.shape[1]
    out = np.full(len(ids_TK), np.nan)
    for asked in folds:
        learned = ~asked
        if learned.any() and asked.any():
            scores = predict(learned, asked)
            best = np.argsort(-scores, axis=1, kind="stable")[:, :K]
            out[asked] = overlap(ids_TK[asked], best)
    return out


def _constant(ids_TK: NDArray[Any], num_experts: int) -> Predict:
    on = chosen(ids_TK, num_experts)
    return lambda learned, asked: np.broadcast_to(on[learned].mean(0), (int(asked.sum()), num_experts))


def _by_label(ids_TK: NDArray[Any], label_T: Ints, num_experts: int) -> Predict:
    on = chosen(ids_TK, num_experts)

    def predict(learned: NDArray[np.bool_], asked: NDArray[np.bool_]) -> Floats:
        table = _PRIOR * np.tile(on[learned].mean(0), (int(label_T.max()) + 1, 1))
        np.add.at(table, label_T[learned], on[learned])
        return np.asarray(table[label_T[asked]])

    return predict


def _by_experts(ids_TK: NDArray[Any], below_TK: NDArray[Any], num_experts: int) -> Predict:
    on, under = chosen(ids_TK, num_experts), chosen(below_TK, num_experts).astype(np.float32)

    def predict(learned: NDArray[np.bool_], asked: NDArray[np.bool_]) -> Floats:
        counts = under[learned].T @ on[learned].astype(np.float32)
        given = (counts + _PRIOR * on[learned].mean(0)) / (under[learned].sum(0)[:, None] + _PRIOR)
        return np.asarray(under[asked] @ given, np.float64)

    return predict


def _before(ids_TK: NDArray[Any], seen: Observed) -> Floats:
    out = np.full(len(seen), np.nan)
    same = seen.sequence[1:] == seen.sequence[:-1]
    out[1:] = np.where(same, overlap(ids_TK[1:], ids_TK[:-1]), np.nan)
    return out
