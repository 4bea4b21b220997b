"""Norm, rotary embedding, attention (GQA and MLA), cache, block, decoder. Start with `decoder.py`."""

from manyhands.nn.cache import Cache
from manyhands.nn.decoder import Decoder, Hidden, Output
from manyhands.nn.init import init_weights

__all__ = ["Cache", "Decoder", "Hidden", "Output", "init_weights"]
