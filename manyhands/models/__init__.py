"""Whole models: embedding, blocks, head, and how they are initialised. Start with `decoder.py`."""

from manyhands.models.decoder import Decoder, Hidden, Output
from manyhands.models.encoder_decoder import EncoderDecoder
from manyhands.models.init import init_weights

__all__ = ["Decoder", "EncoderDecoder", "Hidden", "Output", "init_weights"]
