"""A cache in one piece per layer, for a rectangle of B sequences of one length.

B batch, S sequence.
"""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor

from manyhands.errors import ConfigError
from manyhands.layers.cache.layer import LayerCache


class ContiguousLayer:
    """Grows along the sequence, doubling its room, so that appending costs what is appended."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self.length = 0

    def append(self, *new: Tensor) -> list[Tensor]:
        """Add [..., S, d] tensors at the end; returns views of everything so far, [..., length, d]."""
        added = new[0].shape[-2]
        if not self._buffers:
            with torch.inference_mode(False):  # the cache may be continued outside of it
                self._buffers = [t.new_empty(*t.shape[:-2], max(added, 64), t.shape[-1]) for t in new]
        kinds = [(b.shape[:-2], b.shape[-1]) for b in self._buffers]
        if kinds != [(t.shape[:-2], t.shape[-1]) for t in new]:
            raise ConfigError("the cache was made for another model: make another with model.new_cache()")
        for buffer, t in zip(self.grow(added), new, strict=True):
            buffer.narrow(-2, self.length - added, added).copy_(t)
        return self.read()

    def grow(self, added: int) -> list[Tensor]:
        """Take `added` positions more, which the caller fills; the buffers, [..., room, d]. Not for an empty cache."""
        needed = self.length + added
        if needed > self._buffers[0].shape[-2]:
            with torch.inference_mode(False):
                grown = [b.new_empty(*b.shape[:-2], 2 * needed, b.shape[-1]) for b in self._buffers]
            for old, big in zip(self._buffers, grown, strict=True):
                big[..., : self.length, :] = old[..., : self.length, :]
            self._buffers = grown
        self.length = needed
        return self._buffers

    def read(self) -> list[Tensor]:
        """Views of everything so far, [..., length, d]."""
        return [buffer.narrow(-2, 0, self.length) for buffer in self._buffers]

    @property
    def dtype(self) -> torch.dtype | None:
        """Of what is cached; None while nothing ever was."""
        return self._buffers[0].dtype if self._buffers else None

    def truncate(self, length: int) -> None:
        """Forget everything after the first `length` positions."""
        self.length = min(self.length, length)

    def fork(self) -> Self:
        """A copy, to be continued differently."""
        twin = type(self)()
        with torch.inference_mode(False):
            twin._buffers = [b.new_empty(b.shape) for b in self._buffers]
        for old, new in zip(self._buffers, twin._buffers, strict=True):
            new[..., : self.length, :] = old[..., : self.length, :]
        twin.length = self.length
        return twin

    @property
    def rows(self) -> int | None:
        """Sequences; None while nothing ever was cached."""
        return self._buffers[0].shape[0] if self._buffers else None

    @property
    def values_per_token(self) -> int:
        """How many numbers one token takes in this layer (576 for MLA at DeepSeek-V3's sizes)."""
        return sum(b.numel() // (b.shape[0] * b.shape[-2]) for b in self._buffers)


class Cache:
    """One `LayerCache` per layer, and which of the cached positions are real."""

    def __init__(self, num_layers: int, kind: Callable[[], LayerCache] = ContiguousLayer) -> None:
        self._kind = kind
        self.layers: list[LayerCache] = [kind() for _ in range(num_layers)]
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

    def fork(self) -> "Cache":
        """A copy, to be continued differently."""
        twin = Cache(0, self._kind)
        twin.layers, twin.length, twin.mask_BS = [layer.fork() for layer in self.layers], self.length, self.mask_BS
        return twin

    def extend(self, ids_BS: Tensor, mask_BS: Tensor | None) -> Tensor | None:
        """Make room for new positions; returns the mask of all of them, None where there is no padding."""
        B, S = ids_BS.shape
        rows = self.layers[0].rows
        if rows not in (None, B):
            if self.length:
                raise ConfigError(f"the cache holds {rows} sequences, not {B}: make another with model.new_cache()")
            self.layers = [self._kind() for _ in self.layers]
        if mask_BS is not None or self.mask_BS is not None:
            old, new = ids_BS.new_ones(B, self.length, dtype=torch.bool), ids_BS.new_ones(B, S, dtype=torch.bool)
            old = old if self.mask_BS is None else self.mask_BS
            mask_BS = torch.cat((old, new if mask_BS is None else mask_BS), dim=1)
            self.mask_BS = None if bool(mask_BS.all()) else mask_BS
        self.length += S
        return self.mask_BS
