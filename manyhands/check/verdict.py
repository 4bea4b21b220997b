"""Is another selection wrong, or did rounding decide?

The router under test works in float32 on activations that were rounded on the way. Where two experts' scores are
closer than that rounding, it may rightly choose the other one. Such a flip is counted and adopted, so that it
spoils no later comparison; any other difference is an error.

T rows that choose (tokens, or experts in expert choice), E columns to choose from, K choices.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from manyhands.moe import Routing


@dataclass(frozen=True, slots=True)
class Slack:
    """[T]: how far each token's scores may lie from the oracle's."""

    per_token: Tensor

    @classmethod
    def between(cls, ours: Tensor, theirs: Tensor, limit: float, bias: Tensor | None) -> "Slack":
        """The difference observed between the scores (held to a tolerance of its own), at most `limit`.

        A score plus a bias is rounded once more, to float32 at the size of the sum.
        """
        size = 1.0 if bias is None else 1.0 + float(bias.abs().max())
        return cls((ours - theirs).detach().abs().amax(-1).nan_to_num(nan=limit).clamp(max=limit) + size * 2.0**-22)

    @classmethod
    def none(cls, like: Tensor) -> "Slack":
        """No slack: integers decide."""
        return cls(torch.zeros(len(like), dtype=torch.float64))

    def widest(self, rows: int) -> "Slack":
        """The largest of them, for `rows` rows."""
        return Slack(self.per_token.amax().expand(rows) if len(self.per_token) else torch.zeros(rows))


@dataclass(frozen=True, slots=True)
class Verdict:
    """The selection to go on with, and how many tokens differed, rightly and wrongly."""

    chosen: Tensor
    """[T, E] bool"""
    flips: int
    wrong: int


def one_hot(ids_TK: Tensor, num: int) -> Tensor:
    """[T, num] bool: true at every id >= 0."""
    spare = torch.zeros(len(ids_TK), num + 1, dtype=torch.bool)
    return spare.scatter(1, torch.where(ids_TK < 0, num, ids_TK), True)[:, :num]


def judge_choice(
    own: Tensor, choice: Tensor, tested: Tensor, select: Callable[[Tensor], Tensor], slack: Slack
) -> Verdict:
    """Hold a selection against ours [T, E] bool, made by `select` from the float64 values `choice` [T, E].

    `tested` is [T, K] ids, best first, or [T, E] bool. It is excused if it is what `select` makes of values moved
    by the slack in its favour. Exactly equal values move together, so that ties stay ties: they go to the lower
    index without excuse.
    """
    ordered = torch.ones(len(own), dtype=torch.bool)
    theirs = tested
    if tested.dtype != torch.bool:
        theirs = one_hot(tested.clamp(max=own.shape[1] - 1), own.shape[1])
        ordered = (theirs.sum(1) == own.sum(1)) & (tested < own.shape[1]).all(1) & _best_first(choice, tested, slack)
    same = (own == theirs).all(1)
    tied_TEE = choice[:, :, None] == choice[:, None, :]
    favoured = (tied_TEE & theirs[:, None, :]).any(-1)
    move = 2.0 * slack.per_token[:, None]
    excused = (select(torch.where(favoured, choice + move, choice - move)) == theirs).all(1)
    edge = torch.where(theirs, choice, torch.inf).amin(1, keepdim=True)
    level = torch.where((choice - edge).abs() <= move, edge, choice)  # rounding may also make values equal
    excused |= (select(level) == theirs).all(1)
    fine = (same | excused) & ordered
    chosen = torch.where(fine[:, None], theirs, own)
    return Verdict(chosen, int((fine & ~same).sum()), int((~fine).sum()))


def _best_first(choice: Tensor, ids_TK: Tensor, slack: Slack) -> Tensor:
    """[T]: whether each token's ids come best first, exact ties by number."""
    values = choice.gather(1, ids_TK.clamp(min=0, max=choice.shape[1] - 1))
    fall = values[:, :-1] - values[:, 1:]
    in_order = fall >= -2.0 * slack.per_token[:, None]
    tie_broken = (fall == 0) & (ids_TK[:, :-1] > ids_TK[:, 1:])
    return (in_order & ~tie_broken).all(1)


def judge_kept(own: Tensor, weights: Tensor, tested: Routing, by_weight: bool, slack: Slack) -> Verdict:
    """The same for which pairs found room. Only a queue served by weight can be changed by rounding."""
    theirs = one_hot(torch.where(tested.kept, tested.expert_ids, -1), own.shape[1])
    if torch.equal(own, theirs):
        return Verdict(own, 0, 0)
    changed = (own != theirs).any(1)
    margin = 4.0 * float(slack.per_token.max())
    swapped_in = torch.where(theirs & ~own, weights.detach(), torch.inf).amin(0)
    swapped_out = torch.where(own & ~theirs, weights.detach(), -torch.inf).amax(0)
    even = torch.equal(own.sum(0), theirs.sum(0))
    if by_weight and even and bool((swapped_in >= swapped_out - margin).all()):
        return Verdict(theirs, int(changed.sum()), 0)
    return Verdict(own, 0, int(changed.sum()))
