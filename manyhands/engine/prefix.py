"""What a conversation has already run through the model, so that the next turn runs only what is new.

B = 1 sequence. Position p of the cache holds what the model made of `ids[p]` and those before it: a causal model's
cache is right for any text that begins with the same ids.
"""

from collections.abc import Sequence

from manyhands.layers.cache import Cache
from manyhands.models import Decoder


class Prefix:
    """The cache of one sequence and the ids in it. Empty at first; give it to one `generate` after the other."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        """What has gone through the model."""
        self.cache: Cache | None = None

    def begin(self, model: Decoder, ids: Sequence[int]) -> Cache:
        """The cache for a sequence that begins with `ids`: what they share with the last one is kept.

        At least the last id is left to run, because the next token is drawn from what the model makes of it.
        """
        shared = 0
        for old, new in zip(self.ids, ids[:-1], strict=False):
            if old != new:
                break
            shared += 1
        self.ids = self.ids[:shared]
        if self.cache is None or not shared:
            self.cache = model.new_cache()
        else:
            self.cache.truncate(shared)
        return self.cache

    def clear(self) -> None:
        """Forget all of it: a forward pass was cut short, and the layers hold different lengths."""
        self.ids, self.cache = [], None
