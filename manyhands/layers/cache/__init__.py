"""Where attention keeps what it computed of earlier tokens: the protocol (`layer.py`) and its kinds."""

from manyhands.layers.cache.contiguous import Cache, ContiguousLayer
from manyhands.layers.cache.encoder_decoder import EncoderDecoderCache
from manyhands.layers.cache.latent import LatentLayer
from manyhands.layers.cache.layer import LayerCache
from manyhands.layers.cache.paged import BlockTable, PagedCache, Pool
from manyhands.layers.cache.recurrent import RecurrentCache

AnyCache = Cache | EncoderDecoderCache | RecurrentCache
"""What a model of some kind continues from."""

__all__ = [
    "AnyCache",
    "BlockTable",
    "Cache",
    "ContiguousLayer",
    "EncoderDecoderCache",
    "LatentLayer",
    "LayerCache",
    "PagedCache",
    "Pool",
    "RecurrentCache",
]
