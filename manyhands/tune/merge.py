"""Experts that go are put into those that stay: who into whom, with what share, channel by channel.

`msmoe`, after M-SMoE (Li et al. 2024, arXiv 2310.01334): each goes to the kept expert whose router logits are most like
its own over the tokens, with the share of tokens that chose it. `ream`, after REAM (Jha et al. 2026, arXiv 2604.04356):
the kept, from the one worth most on, each take up to 16 of those most like them that are left, so that most stay as
they are; alike by the mean of two cosines, of router logits and of gated outputs; with shares by REAP's measure. Both
first reorder an expert's channels to lie on those of the kept one (by the weights; REAM adds activations), and keep
the kept expert's row of the router. M-SMoE as published keeps every row, which no family's files can say.

T tokens, E experts, F expert width, D model width, G groups of the router.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from manyhands.kernels import ExpertWeights
from manyhands.moe import Experts, Routing
from manyhands.tune.align import aligned
from manyhands.tune.importance import Seen
from manyhands.tune.keep import Group, Member

Merge = Literal["msmoe", "ream"]
MOST_JOINED = 16
"""Experts that one kept expert takes (REAM's group size)."""
MOST_TOKENS = 1024
"""On which all experts are run, to compare what they say."""
AT_A_TIME = 1 << 24
"""Values of their outputs that are held."""


@dataclass(frozen=True, slots=True)
class Likeness:
    """How alike a layer's experts are: [E, E] float64 cosines."""

    logits: Tensor
    outputs: Tensor | None

    @property
    def both(self) -> Tensor:
        """The mean of what is known."""
        return self.logits if self.outputs is None else (self.logits + self.outputs) / 2


def likeness(x_TD: Tensor, routing: Routing, experts: Experts | None) -> Likeness:
    """Over these tokens; outputs are compared if experts are given, on the first 1,024."""
    logits_TE = routing.logits.double()
    if experts is None:
        return Likeness(_cosines(logits_TE.T @ logits_TE), None)
    E, D = routing.num_experts, x_TD.shape[1]
    gram_EE = torch.zeros(E, E, dtype=torch.float64)
    chunk = max(1, AT_A_TIME // (E * D))
    for start in range(0, min(len(x_TD), MOST_TOKENS), chunk):
        rows = slice(start, min(start + chunk, MOST_TOKENS))
        gated_ETD = _all_outputs(experts, x_TD[rows], routing.rows(rows)).transpose(0, 1)
        flat = gated_ETD.reshape(E, -1).double()
        gram_EE += flat @ flat.T
    return Likeness(_cosines(logits_TE.T @ logits_TE), _cosines(gram_EE))


def _all_outputs(experts: Experts, x_TD: Tensor, routing: Routing) -> Tensor:
    """[T, E, D]: what every expert says, times the router's score of it."""
    T, E = routing.scores.shape
    ids_TE = torch.arange(E).expand(T, E).contiguous()
    every = torch.ones(T, E)
    asked = Routing(ids_TE, every, routing.scores, routing.logits, every.bool(), routing.token_mask)
    return experts.outputs(x_TD, asked) * routing.scores[..., None]


def _cosines(gram_EE: Tensor) -> Tensor:
    norm_E = gram_EE.diagonal().clamp(min=1e-300).sqrt()
    return gram_EE / norm_E[:, None] / norm_E


def merged(
    how: Merge,
    kept: Sequence[int],
    score_E: Tensor,
    seen: Seen,
    alike: Likeness,
    num_groups: int,
    weights: ExpertWeights,
) -> list[Group]:
    """The kept experts, ascending, each with those that are put into it."""
    joined = _nearest(kept, alike.logits, num_groups)
    shares_E = seen.tokens
    if how == "ream":
        joined, shares_E = _by_worth(kept, score_E, alike.both, num_groups), seen.score("reap")
    found: list[Group] = []
    for expert in sorted(kept):
        members = [e for e in [expert, *joined[expert]] if e == expert or shares_E[e] > 0]
        total = float(shares_E[members].sum())
        if total <= 0:  # nothing is known of them: the kept one alone
            found.append((Member(expert),))
            continue
        group = [Member(expert, float(shares_E[expert]) / total)]
        for other in members[1:]:
            group.append(Member(other, float(shares_E[other]) / total, aligned(weights, expert, other)))
        found.append(tuple(group) if len(group) > 1 else (Member(expert),))
    return found


def _allowed(alike_EE: Tensor, kept: Sequence[int], num_groups: int) -> Tensor:
    """[E, E]: -inf where an expert cannot go: to one that does not stay, or to another of the router's groups."""
    E = len(alike_EE)
    group_E = torch.arange(E) // (E // num_groups)
    stays_E = torch.zeros(E, dtype=torch.bool)
    stays_E[list(kept)] = True
    return alike_EE.masked_fill((group_E[:, None] != group_E) | ~stays_E, float("-inf"))


def _nearest(kept: Sequence[int], alike_EE: Tensor, num_groups: int) -> dict[int, list[int]]:
    """Every expert that goes joins the kept one most like it."""
    to_E = _allowed(alike_EE, kept, num_groups).argmax(1).tolist()
    return {expert: [e for e, to in enumerate(to_E) if to == expert and e not in kept] for expert in kept}


def _by_worth(kept: Sequence[int], score_E: Tensor, alike_EE: Tensor, num_groups: int) -> dict[int, list[int]]:
    """From the expert worth most on, each takes those most like it, 16 at most, until all are taken."""
    allowed_EE = _allowed(alike_EE, kept, num_groups)
    left = set(range(len(score_E))) - set(kept)
    joined: dict[int, list[int]] = {}
    for expert in sorted(kept, key=lambda e: (-float(score_E[e]), e)):
        likely = [e for e in allowed_EE[:, expert].argsort(descending=True, stable=True).tolist() if e in left]
        joined[expert] = [e for e in likely if allowed_EE[e, expert] > float("-inf")][:MOST_JOINED]
        left -= set(joined[expert])
    for expert in sorted(left):  # more than every kept expert may take
        joined[int(allowed_EE[expert].argmax())].append(expert)
    return joined
