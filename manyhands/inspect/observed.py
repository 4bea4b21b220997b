"""Who went where, as plain arrays: all that the measures of this room read.

T tokens   L sparse layers   K experts per token   E experts   R random routers
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Observed:
    """The routing of some texts. Row t of every array is token t; texts and sequences lie one behind the other."""

    layers: tuple[int, ...]
    """The L numbers of the sparse layers."""
    num_experts: int
    """E."""
    expert_ids: NDArray[np.int32]
    """[T, L, K], best first; -1 for no expert."""
    token_ids: Ints
    """[T]; -1 where nobody said."""
    sequence: Ints
    """[T]: tokens of equal number were read in one piece, each seeing those before it."""
    text: Ints
    """[T], from 0: what is drawn, whole, when intervals are bootstrapped. Tokens of one text are not independent."""
    domain: Ints
    """[T]: index into `domains`."""
    domains: tuple[str, ...] = ("text",)
    tag: Ints | None = None
    """[T]: index into `tags` (part of speech); -1 where a token belongs to no single word."""
    tags: tuple[str, ...] = ()
    early_ids: NDArray[np.int32] | None = None
    """[T, L, K]: what each layer's own router says before that layer's attention has been added."""
    random_ids: NDArray[np.int32] | None = None
    """[R, T, L, K]: what routers with random weights say of the same hidden states."""
    about: dict[str, Any] = field(default_factory=dict)
    """What a person should know of where this is from."""

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def experts_per_token(self) -> int:
        """K."""
        return int(self.expert_ids.shape[2])

    def variants(self, layer: int) -> list[NDArray[np.int32]]:
        """[T, K] of one layer (by its index): the model's, then each random router's."""
        random = [] if self.random_ids is None else [ids[:, layer] for ids in self.random_ids]
        return [self.expert_ids[:, layer], *random]


def chosen(ids_TK: NDArray[Any], num_experts: int) -> NDArray[np.bool_]:
    """[T, E]: whether the token went to the expert."""
    out = np.zeros((len(ids_TK), num_experts + 1), np.bool_)
    np.put_along_axis(out, np.where(ids_TK < 0, num_experts, ids_TK).astype(np.int64), True, axis=1)
    return out[:, :num_experts]


def overlap(a_TK: NDArray[Any], b_TK: NDArray[Any]) -> Floats:
    """[T]: of the experts in `a`, the share that is in `b` too; NaN where `a` has none."""
    same = ((a_TK[:, :, None] == b_TK[:, None, :]) & (a_TK[:, :, None] >= 0)).any(2).sum(1)
    count = (a_TK >= 0).sum(1)
    return np.where(count > 0, same / np.maximum(count, 1), np.nan)
