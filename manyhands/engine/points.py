"""The random number that a token is drawn with: a function of seed, choice and place, and of nothing else."""

import numpy as np

_WORD = (1 << 64) - 1


def point(seed: int, choice: int, position: int) -> float:
    """In [0, 1), a multiple of 2^−53: the first word of Philox-4×64 (Salmon et al. 2011) for this key and counter.

    `position` is the token's place in its sequence, the prompt included.
    """
    words = np.random.Philox(key=(choice << 64) | (seed & _WORD), counter=position).random_raw(1)
    return float(int(words[0]) >> 11) * 2.0**-53
