"""What decoding keeps in an encoder-decoder: the decoder's own keys and values, and those of the encoder's output.

B batch, L positions of the input, H heads, d head width.
"""

from torch import Tensor

from manyhands.errors import ConfigError
from manyhands.layers.cache.contiguous import Cache


class EncoderDecoderCache(Cache):
    """A `Cache` of the decoder's layers, and what each of them sees of the input, computed once."""

    def __init__(self, num_layers: int) -> None:
        super().__init__(num_layers)
        self.memory: list[tuple[Tensor, Tensor]] | None = None
        """Keys and values [B, H, L, d] of the encoded input, for each decoder layer; None before it is encoded."""
        self.memory_mask_BL: Tensor | None = None
        """[B, L] bool, false for padding of the input; None where there is none."""

    def fork(self) -> "EncoderDecoderCache":
        """A copy, to be continued differently. The input's keys and values never change and are shared."""
        twin = EncoderDecoderCache(0)
        twin.layers, twin.length, twin.mask_BS = [layer.fork() for layer in self.layers], self.length, self.mask_BS
        twin.memory, twin.memory_mask_BL = self.memory, self.memory_mask_BL
        return twin

    def extend(self, ids_BS: Tensor, mask_BS: Tensor | None) -> Tensor | None:
        """Make room for new positions of the decoder; returns the mask of all of them, None without padding."""
        if self.memory is not None and (rows := self.memory[0][0].shape[0]) != ids_BS.shape[0]:
            raise ConfigError(f"the cache holds {rows} encoded inputs, the decoder ids have {ids_BS.shape[0]} rows")
        return super().extend(ids_BS, mask_BS)
