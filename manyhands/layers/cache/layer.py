"""What a layer of attention asks of the place where it keeps what it computed of earlier tokens.

A layer stores one or two tensors [B, G, S, d], S positions: keys and values of G heads, or MLA's latents (G = 1).
"""

from collections.abc import Sequence
from typing import Protocol, Self

import torch
from torch import Tensor


class LayerCache(Protocol):
    """One layer's cache. Which kind it is changes no number that attention computes.

    | kind | where | for |
    |---|---|---|
    | contiguous | one tensor, all positions of B sequences | rectangles: whoever calls a model by hand |
    | latent | the same, of MLA's latents | MLA |
    | paged | blocks of a pool, by a table | the engine: sequences that grow, share and end; the native kernels |
    """

    @property
    def length(self) -> int:
        """Positions stored so far."""

    def append(self, *new: Tensor) -> Sequence[Tensor]:
        """Add [B, G, S, d] tensors at the end; returns everything so far, [B, G, length, d], to be read at once."""

    def read(self) -> Sequence[Tensor]:
        """Everything so far, [B, G, length, d], to be read at once."""

    def truncate(self, length: int) -> None:
        """Forget everything after the first `length` positions."""

    def fork(self) -> Self:
        """The same positions, to be continued differently."""

    @property
    def dtype(self) -> torch.dtype | None:
        """Of what is cached; None while nothing ever was."""

    @property
    def rows(self) -> int | None:
        """Sequences; None while nothing ever was cached."""

    @property
    def values_per_token(self) -> int:
        """How many numbers one token takes in this layer."""
