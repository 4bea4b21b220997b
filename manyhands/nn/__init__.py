"""The old name of `manyhands.models` and `manyhands.layers`, for one release."""

from manyhands.layers.cache import Cache
from manyhands.models import Decoder, Hidden, Output, init_weights

__all__ = ["Cache", "Decoder", "Hidden", "Output", "init_weights"]
