"""Small tokens for tests."""

import numpy as np

from manyhands.simulate.tokens import Tokens


def some_tokens(T: int = 60, L: int = 3, K: int = 2, E: int = 8, seed: int = 0, prompt: int = 10) -> Tokens:
    """Two texts: a prompt in one pass and decoded tokens of the first, then the second; a few places have no expert."""
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((T, L, E)) + np.linspace(0, 1.5, E), axis=-1)[..., :K].astype(np.uint8)
    ids[rng.random((T, L, K)) < 0.05] = 255
    step = np.maximum(np.arange(T) - prompt + 1, 0).astype(np.int32)
    sequence = (np.arange(T) >= 2 * T // 3).astype(np.int32)
    return Tokens(ids, step, sequence, step > 0, 255)
