"""By what a block of the cache is found again: a digest of its tokens and of all that came before them. Needs no torch.

A causal model's keys and values at a position are made of the tokens up to it, so that equal digests mean equal
contents. The digest is 256 bits of BLAKE2b: two texts with the same one are no concern.
"""

from array import array
from collections.abc import Sequence
from hashlib import blake2b

_SIZE = 32


class Chain:
    """The keys of one sequence's full blocks, as far as it was followed."""

    def __init__(self, salt: str = "", epoch: int = 0) -> None:
        """Sequences find each other's blocks where salt and epoch are the same."""
        self.salt, self.epoch = salt, epoch
        self.keys: list[bytes] = []
        self._start = blake2b(f"{epoch}\0{salt}".encode("utf-8", "surrogatepass"), digest_size=_SIZE).digest()

    def follow(self, ids: Sequence[int]) -> None:
        """The tokens of the next block."""
        parent = self.keys[-1] if self.keys else self._start
        self.keys.append(blake2b(parent + array("q", ids).tobytes(), digest_size=_SIZE).digest())
