"""What one engine remembers of what went through the model: the caches of all requests, and what is kept with them.

T tokens of a pass.
"""

from collections.abc import Callable, Sequence
from functools import partial
from weakref import WeakSet

from manyhands.engine.blocks import BLOCK_SIZE, Blocks
from manyhands.engine.caches import Caches, blocks_of, bytes_per_token
from manyhands.engine.kept_routing import KeptRouting, routing_bytes_per_token
from manyhands.engine.prefix import Prefix
from manyhands.engine.request import Request
from manyhands.engine.runner import Routed, Runner
from manyhands.engine.scheduler import Chunk
from manyhands.engine.state import state_of
from manyhands.engine.weights import Weights
from manyhands.errors import UserError
from manyhands.layers.cache import Cache
from manyhands.models import Decoder


class Memory:
    """Made by the engine, which explains the settings."""

    def __init__(
        self,
        model: Decoder,
        max_sequences: int,
        cache_tokens: int | None,
        cache_bytes: int | None,
        paged: bool | None,
        prefix_caching: bool,
        keep_routing: bool,
    ) -> None:
        """Raises `UserError` for settings that contradict each other, and for less than one block."""
        if cache_tokens is not None and cache_bytes is not None:
            raise UserError("cache_tokens and cache_bytes both bound the cache: give one of them")
        if cache_bytes is not None and paged is False:
            raise UserError("cache_bytes bounds a cache in blocks: give it without paged=False")
        config, at_once = model.config, cache_bytes is not None
        keep_routing = keep_routing and config.moe is not None
        self.bytes_per_token = bytes_per_token(config, model.embed_tokens.weight.dtype)
        if keep_routing:
            self.bytes_per_token += routing_bytes_per_token(config)
        context = -(-config.longest_continued // BLOCK_SIZE)
        if cache_bytes is not None:
            self.blocks = Blocks(blocks_of(cache_bytes, self.bytes_per_token))
        elif cache_tokens is not None:
            self.blocks = Blocks(max(1, cache_tokens // BLOCK_SIZE))
        else:
            self.blocks = Blocks(max_sequences * context, most_idle=context)
        self.caches = Caches(len(model.layers), self.blocks, at_once)
        self.kept = KeptRouting(config, self.blocks.num_blocks, at_once) if keep_routing else None
        self._model, self._prefix_caching = model, prefix_caching
        self._paged = True if at_once else paged
        self._weights: Weights | None = None
        self._prefixes: WeakSet[Prefix] = WeakSet()

    def paged(self, runner: Runner) -> bool:
        """Whether caches are in blocks."""
        if self._paged is None:
            self._paged = runner.reads_blocks
        return self._paged

    def caching(self, runner: Runner) -> bool:
        """Whether what one request computed is found by another."""
        return self._prefix_caching and self.paged(runner)

    def changed(self) -> bool:
        """Whether the weights are others than when somebody last asked."""
        if self._weights is None:
            self._weights = Weights(self._model)
            return False
        return self._weights.changed()

    def new_cache(self, request: Request, runner: Runner) -> Callable[[], Cache]:
        """Makes one for what is computed of a request."""
        if not self.paged(runner):
            return self._model.new_cache
        return partial(self.caches.new, request.table, request.num_computed)

    def resume(self, request: Request, prefix: Prefix, runner: Runner) -> None:
        """A new request goes on with what a conversation has kept, unless it wants more than that is."""
        self._prefixes.add(prefix)
        state = state_of(request)
        if self.kept is not None or state.keeps_routing or request.scores_prompt:
            prefix.clear()
        state.resume(request, self.new_cache(request, runner))

    def forget_prefixes(self, running: Sequence[Request]) -> None:
        """What conversations keep for their next turns goes, but for those that have the word."""
        active = {state_of(request).prefix for request in running}
        for prefix in self._prefixes:
            if prefix not in active:
                prefix.clear()

    def keep_routing(self, chunks: Sequence[Chunk], routed: Routed) -> None:
        """Who went where in a pass of these chunks, which are not counted as computed yet."""
        if self.kept is not None:
            rows = [(chunk.request.table, chunk.request.num_computed, chunk.count) for chunk in chunks]
            self.kept.write(rows, *routed.experts())

    def read_routing(self, request: Request) -> None:
        """What is kept with the blocks of a request that wants it becomes its own; after its end there is nothing."""
        if self.kept is not None and state_of(request).reads_routing and request.num_computed and request.table.ids:
            state_of(request).routings = [self.kept.read(request.table, request.num_computed)]

    def rest(self) -> None:
        """Give back what nobody holds and nobody can find."""
        if self.caches.rest() and self.kept is not None:
            self.kept.release()
