"""The cache of keys and values, or of MLA's latents, for step-by-step decoding.

B batch, S sequence. A layer stores tensors whose second-to-last dimension is the sequence.
"""

import torch
from torch import Tensor


class LayerCache:
    """Grows along the sequence, doubling its room, so that appending costs what is appended."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self.length = 0

    def append(self, *new: Tensor) -> list[Tensor]:
        """Add [..., S, d] tensors at the end; returns views of everything so far, [..., length, d]."""
        added = new[0].shape[-2]
        needed = self.length + added
        if not self._buffers:
            self._buffers = [t.new_empty(*t.shape[:-2], max(needed, 64), t.shape[-1]) for t in new]
        elif needed > self._buffers[0].shape[-2]:
            grown = [b.new_empty(*b.shape[:-2], 2 * needed, b.shape[-1]) for b in self._buffers]
            for old, big in zip(self._buffers, grown, strict=True):
                big[..., : self.length, :] = old[..., : self.length, :]
            self._buffers = grown
        for buffer, t in zip(self._buffers, new, strict=True):
            buffer.narrow(-2, self.length, added).copy_(t)
        self.length = needed
        return [buffer.narrow(-2, 0, needed) for buffer in self._buffers]

    def truncate(self, length: int) -> None:
        """Forget everything after the first `length` positions."""
        self.length = min(self.length, length)

    @property
    def values_per_token(self) -> int:
        """How many numbers one token takes in this layer (576 for MLA at DeepSeek-V3's sizes)."""
        return sum(b.numel() // (b.shape[0] * b.shape[-2]) for b in self._buffers)


class Cache:
    """One `LayerCache` per layer, and which of the cached positions are real."""

    def __init__(self, num_layers: int) -> None:
        self.layers = [LayerCache() for _ in range(num_layers)]
        self.length = 0
        """Positions stored so far, padding included."""
        self.mask_BS: Tensor | None = None
        """[B, length] bool; None while there is no padding."""

    def truncate(self, length: int) -> None:
        """Forget everything after the first `length` positions, in every layer."""
        for layer in self.layers:
            layer.truncate(length)
        self.length = min(self.length, length)
        self.mask_BS = None if self.mask_BS is None or not length else self.mask_BS[:, :length]

    def extend(self, ids_BS: Tensor, mask_BS: Tensor | None) -> Tensor | None:
        """Make room for new positions; returns the mask of all of them, None where there is no padding."""
        B, S = ids_BS.shape
        if mask_BS is not None or self.mask_BS is not None:
            old, new = ids_BS.new_ones(B, self.length, dtype=torch.bool), ids_BS.new_ones(B, S, dtype=torch.bool)
            old = old if self.mask_BS is None else self.mask_BS
            mask_BS = torch.cat((old, new if mask_BS is None else mask_BS), dim=1)
            self.mask_BS = None if bool(mask_BS.all()) else mask_BS
        self.length += S
        return self.mask_BS
