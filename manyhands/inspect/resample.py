"""A figure beside its nulls: shuffled, random routers, and an interval over texts.

    figure = tables.figure(statistic, ids of the model, ids of random routers, shuffle)

Intervals are bootstrapped over texts, drawn whole within their domain: tokens of one text resemble each other, and
an interval over tokens would be too narrow. They are centred: what drawing with replacement adds to a plug-in
estimate (a bias, the same for each draw) is taken off. Source: Efron & Tibshirani 1993, chapters 10 and 13.

T tokens   B bootstrap draws
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from manyhands.inspect.observed import Floats, Ints, Observed

Statistic = Callable[[NDArray[np.int32], Floats], float]
"""Of the experts of each token, [T] or [T, K], and the weight of each token, [T]."""
Shuffle = Callable[[NDArray[np.int32], np.random.Generator], NDArray[np.int32]]


@dataclass(frozen=True)
class Figure:
    """One number beside what it would be without specialisation. NaN where there is nothing to measure."""

    value: float
    low: float = math.nan
    high: float = math.nan
    """95 % interval of `value`, over texts."""
    shuffled: float = math.nan
    """The mean over shuffles: the same experts, dealt to other tokens. Information has it subtracted already."""
    shuffled_sd: float = math.nan
    random: float = math.nan
    """The mean over routers with random weights and equal loads, on the same hidden states."""
    random_low: float = math.nan
    random_high: float = math.nan
    """The lowest and the highest end of these routers' 95 % intervals."""
    samples: int = 0

    @property
    def above_random(self) -> bool | None:
        """Whether the interval lies above all of the random routers'; None where there are none."""
        return None if math.isnan(self.random) or math.isnan(self.low) else self.low > self.random_high


class Resampler:
    """Draws of whole texts, the same for every figure of one `Observed`."""

    def __init__(self, seen: Observed, draws: int = 100, shuffles: int = 5, seed: int = 0) -> None:
        self.text, self.shuffles, self.seed = seen.text, shuffles, seed
        texts = int(seen.text.max()) + 1 if len(seen) else 0
        domain = np.zeros(texts, np.int64)
        domain[seen.text] = seen.domain
        rng = np.random.default_rng(seed)
        self.weights_BX = np.zeros((draws, texts))
        """[B, texts]: how often each text is drawn."""
        for each in np.unique(domain):
            members = np.flatnonzero(domain == each)
            self.weights_BX[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), draws)
        self.few = texts < 2

    def mean(self, values: Sequence[Floats], null: float = math.nan, rows: Ints | None = None) -> Figure:
        """Of a mean over tokens: `values` [T] of the model, then of each random router; NaN is left out.

        `rows` are the tokens the values belong to; without it, all.
        """
        text = self.text if rows is None else self.text[rows]
        found = [self._mean(value, text) for value in values]
        return _figure(found, [null], int(np.isfinite(values[0]).sum()))

    def _mean(self, value: Floats, text: Ints) -> tuple[float, float, float]:
        real = np.isfinite(value)
        texts = self.weights_BX.shape[1]
        sums = np.bincount(text[real], value[real], texts)
        counts = np.bincount(text[real], minlength=texts)
        if not counts.sum():
            return math.nan, math.nan, math.nan
        whole = float(sums.sum() / counts.sum())
        drawn = self.weights_BX @ sums / np.maximum(self.weights_BX @ counts, 1e-12)
        return whole, *self._ends(whole, drawn)

    def figure(
        self, statistic: Statistic, ids: Sequence[NDArray[np.int32]], shuffle: Shuffle, excess: bool = False
    ) -> Figure:
        """Of any statistic of the experts; `ids` are the model's, then each random router's.

        `excess`: the mean over shuffles, the bias of a plug-in estimate, is subtracted, of each router its own.
        """
        ones = np.ones(len(self.text))
        found: list[tuple[float, float, float]] = []
        nulls: list[float] = []
        for number, each in enumerate(ids):
            rng = np.random.default_rng([self.seed, number])
            whole = statistic(each, ones)
            drawn = np.array([statistic(each, weight_X[self.text]) for weight_X in self.weights_BX])
            low, high = self._ends(whole, drawn)
            bias = 0.0
            if excess or number == 0:
                shuffled = [statistic(shuffle(each, rng), ones) for _ in range(self.shuffles)]
                bias = float(np.mean(shuffled)) if excess else 0.0
                nulls = nulls or shuffled
            found.append((whole - bias, low - bias, high - bias))
        return _figure(found, nulls, len(self.text))

    def _ends(self, whole: float, drawn: Floats) -> tuple[float, float]:
        if self.few:
            return math.nan, math.nan
        low, high = np.quantile(drawn - drawn.mean(), [0.025, 0.975])
        return float(whole + low), float(whole + high)


def _figure(found: Sequence[tuple[float, float, float]], nulls: Sequence[float], samples: int) -> Figure:
    (value, low, high), others = found[0], np.array(found[1:]).reshape(-1, 3)
    sd = float(np.std(nulls, ddof=1)) if len(nulls) > 1 else math.nan
    if not len(others):
        return Figure(value, low, high, float(np.mean(nulls)), sd, samples=samples)
    random, least, most = float(others[:, 0].mean()), float(others[:, 1].min()), float(others[:, 2].max())
    return Figure(value, low, high, float(np.mean(nulls)), sd, random, least, most, samples)


def over_all(ids: NDArray[np.int32], rng: np.random.Generator) -> NDArray[np.int32]:
    """Deal the experts to other tokens: loads stay."""
    return rng.permutation(ids, axis=0)


def within(groups: Ints) -> Shuffle:
    """Deal the experts to other tokens of the same group ([T]): what the group explains stays."""
    home = np.argsort(groups, kind="stable")

    def shuffle(ids: NDArray[np.int32], rng: np.random.Generator) -> NDArray[np.int32]:
        out = np.empty_like(ids)
        out[home] = ids[np.lexsort((rng.random(len(groups)), groups))]
        return out

    return shuffle
