"""MLA's cache: per token one latent and one rotated key, the same for all heads.

L positions, R latent width, r rotated width.
"""

from torch import Tensor

from manyhands.layers.cache.contiguous import ContiguousLayer


class LatentLayer(ContiguousLayer):
    """One tensor [B, 1, L, R + r]: whole it is every head's key, its first R numbers are every head's value."""

    def append(self, *new: Tensor) -> list[Tensor]:
        """Add [B, 1, S, R + r]; returns [B, 1, L, R + r]."""
        assert len(new) == 1 and new[0].shape[1] == 1
        return super().append(*new)
