"""Which tokens each expert takes: specialisation by token id, and what chance alone would show.

    T tokens   K experts per token   E experts   V vocabulary   N = T·K routed pairs

Sources: OLMoE (arXiv 2409.02060 §5) for vocabulary specialisation, Mixtral (arXiv 2401.04088 §5) for repetition.
Every score comes with its null: small samples make any router look specialised.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from manyhands.parallel.ranks import Ranks


class TopToken(NamedTuple):
    """A token an expert takes: of all its visits to experts, the `share` that goes to this one."""

    token_id: int
    share: float
    """Of the token's pairs; 1/K at most when its K experts are distinct."""
    visits: int
    """How often the token went to this expert."""
    ratio: float
    """`share` over the expert's share of all pairs; 1 is chance."""


class Measure(NamedTuple):
    """A score beside what it would be if tokens met experts at random, loads unchanged. NaN without samples."""

    value: float
    null: float
    samples: int


class _Layer:
    """Integer counts of one sparse layer."""

    def __init__(self, num_experts: int, vocab_size: int) -> None:
        self.pairs_EV = torch.zeros(num_experts, vocab_size, dtype=torch.int64)
        self.first_EV = torch.zeros(num_experts, vocab_size, dtype=torch.int64)
        self.pairs_V = torch.zeros(vocab_size, dtype=torch.int64)
        self.first_V = torch.zeros(vocab_size, dtype=torch.int64)
        self.neighbours = 0
        self.repeats = 0


class TokenShare:
    """Counts of (expert, token id) per sparse layer, filled batch by batch with `add`.

    Needs 16·E·V bytes per layer on the CPU, whatever the number of tokens.
    """

    def __init__(self, num_experts: int, vocab_size: int) -> None:
        self.num_experts = num_experts
        self.vocab_size = vocab_size
        self._layers: dict[int, _Layer] = {}

    @property
    def layers(self) -> list[int]:
        """The layers that have counts, in order."""
        return sorted(self._layers)

    @torch.no_grad()
    def add(self, layer: int, ids_T: Tensor, expert_ids_TK: Tensor, mask_T: Tensor | None = None) -> None:
        """Count one batch of one layer.

        ids_T           token ids, `[T]` or `[B, S]`; rows of `[B, S]` are separate texts (for `repetition`).
        expert_ids_TK   the experts of each token, first choice in column 0, -1 for none; `[T, K]` or `[B, S, K]`.
        mask_T          False where there is no token (padding); the shape of `ids_T`.
        """
        ids_BS = ids_T.detach().to("cpu", torch.int64).reshape(-1, ids_T.shape[-1])
        experts_BSK = expert_ids_TK.detach().to("cpu", torch.int64).reshape(*ids_BS.shape, -1)
        mask_BS = torch.ones_like(ids_BS, dtype=torch.bool) if mask_T is None else mask_T.cpu().reshape(ids_BS.shape)
        chosen_BSK = (experts_BSK >= 0) & mask_BS[:, :, None]
        if not chosen_BSK.any():
            return
        # A value out of range would be counted for a neighbouring expert.
        real_ids = ids_BS[mask_BS]
        assert int(real_ids.min()) >= 0 and int(real_ids.max()) < self.vocab_size, "token id outside the vocabulary"
        assert int(experts_BSK[chosen_BSK].max()) < self.num_experts, "no such expert"
        counts = self._layers.setdefault(layer, _Layer(self.num_experts, self.vocab_size))
        cells_BSK = experts_BSK * self.vocab_size + ids_BS[:, :, None]
        cells_N, firsts = cells_BSK[chosen_BSK], cells_BSK[:, :, 0][chosen_BSK[:, :, 0]]
        _count(counts.pairs_EV, cells_N)
        _count(counts.first_EV, firsts)
        _count(counts.pairs_V, cells_N % self.vocab_size)
        _count(counts.first_V, firsts % self.vocab_size)
        both = chosen_BSK[:, 1:, 0] & chosen_BSK[:, :-1, 0]
        same = experts_BSK[:, 1:, 0] == experts_BSK[:, :-1, 0]
        counts.neighbours += int(both.sum())
        counts.repeats += int((both & same).sum())

    def over(self, ranks: Ranks, layers: Iterable[int]) -> "TokenShare":
        """The counts of all ranks together; each may have counted any of these layers, or none."""
        together = TokenShare(self.num_experts, self.vocab_size)
        for layer in layers:
            mine, total = self._layers.get(layer) or _Layer(self.num_experts, self.vocab_size), _Layer(0, 0)
            total.pairs_EV, total.first_EV = ranks.sum(mine.pairs_EV), ranks.sum(mine.first_EV)
            total.pairs_V, total.first_V = ranks.sum(mine.pairs_V), ranks.sum(mine.first_V)
            total.neighbours, total.repeats = ranks.sum(torch.tensor([mine.neighbours, mine.repeats])).tolist()
            if total.pairs_V.any():
                together._layers[layer] = total
        return together

    def load(self, layer: int) -> list[float]:
        """Share of all pairs that each of the E experts takes."""
        load_E = self._layers[layer].pairs_EV.sum(1).double()
        return [float(share) for share in load_E / load_E.sum()]

    def experts_per_token(self, layer: int) -> float:
        """Experts per token that chose any: K, unless a router leaves places empty."""
        counts = self._layers[layer]
        return float(counts.pairs_V.sum()) / max(1.0, float(counts.first_V.sum()))

    def top_tokens(self, layer: int, expert: int, n: int = 8, min_count: int = 10) -> list[TopToken]:
        """The up to `n` tokens, among those seen `min_count` times or more, of which `expert` takes most.

        Ordered by share, then by visits. Only tokens the expert took at least once.
        """
        counts = self._layers[layer]
        pairs_V, taken_V = counts.pairs_V, counts.pairs_EV[expert]
        ids = torch.nonzero((counts.first_V >= min_count) & (taken_V > 0)).squeeze(1).numpy()
        taken, total = taken_V.numpy()[ids], pairs_V.numpy()[ids]
        share = taken / total
        chance = float(taken_V.sum() / pairs_V.sum())
        best = np.lexsort((ids, -taken, -share))[:n]
        return [TopToken(int(ids[i]), float(share[i]), int(taken[i]), float(share[i]) / chance) for i in best]

    def vocabulary_specialisation(self, layer: int, min_count: int = 10, shuffles: int = 4, seed: int = 0) -> Measure:
        """How far the token id alone decides the first expert: the mean over ids of the largest expert's share.

        1: every id always goes to one expert. The null shuffles the first choices over all tokens, so each
        expert keeps its load and each id its frequency; it is above 1/E because ids are seen a finite number of
        times. Ids seen fewer than `min_count` times are left out. `samples` is the number of ids.
        """
        first_EV = self._layers[layer].first_EV.numpy()
        count_V = self._layers[layer].first_V.numpy()
        frequent = np.flatnonzero(count_V >= max(min_count, 1))
        if not len(frequent):
            return Measure(float("nan"), float("nan"), 0)
        value = float((first_EV[:, frequent].max(0) / count_V[frequent]).mean())
        column_T = np.repeat(np.arange(len(frequent)), count_V[frequent])
        experts_T = np.repeat(np.arange(self.num_experts), first_EV.sum(1))
        rng = np.random.default_rng(seed)
        null = 0.0
        for _ in range(shuffles):
            drawn_T = rng.permutation(experts_T)[: len(column_T)]
            cells = np.bincount(drawn_T * len(frequent) + column_T, minlength=self.num_experts * len(frequent))
            null += float((cells.reshape(self.num_experts, -1).max(0) / count_V[frequent]).mean()) / shuffles
        return Measure(value, null, len(frequent))

    def repetition(self, layer: int) -> Measure:
        """How often two neighbouring tokens have the same first expert; the null is a shuffled text's.

        `samples` is the number of neighbouring pairs. A balanced layer's null is 1/E.
        """
        counts = self._layers[layer]
        load_E = counts.first_EV.sum(1).double()
        total = float(load_E.sum())
        if not counts.neighbours:
            return Measure(float("nan"), float("nan"), 0)
        null = float((load_E * (load_E - 1)).sum()) / (total * (total - 1))
        return Measure(counts.repeats / counts.neighbours, null, counts.neighbours)


def _count(counts: Tensor, cells: Tensor) -> None:
    """Add 1 at each flat index in `cells`."""
    counts.view(-1).index_add_(0, cells, torch.ones_like(cells))
