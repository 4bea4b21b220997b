"""Routings with known answers, for tests."""

import numpy as np

from manyhands.inspect.observed import Observed


def observed(ids_TLK, token_ids=None, texts: int = 40, domain=None, E: int = 8, **more) -> Observed:
    """`texts` texts of equal length, each one sequence."""
    ids = np.asarray(ids_TLK, np.int32)
    T = len(ids)
    text = np.arange(T) * texts // T
    return Observed(
        layers=tuple(range(ids.shape[1])),
        num_experts=E,
        expert_ids=ids,
        token_ids=np.arange(T) % 7 if token_ids is None else np.asarray(token_ids, np.int64),
        sequence=text,
        text=text,
        domain=np.zeros(T, np.int64) if domain is None else np.asarray(domain)[text],
        **more,
    )


def drawn(T: int, L: int, E: int, K: int, seed: int = 0):
    """[T, L, K] distinct experts, uniform."""
    return np.random.default_rng(seed).random((T, L, E)).argsort(-1)[:, :, :K].astype(np.int32)
