"""Whole models, a file for each kind, and how they are initialised. Start with `decoder.py`."""

from manyhands.models.build import AnyModel, LanguageModel, build
from manyhands.models.decoder import Decoder, Hidden, Output
from manyhands.models.encoder_decoder import EncoderDecoder
from manyhands.models.init import init_weights
from manyhands.models.recurrent import Recurrent

__all__ = [
    "AnyModel",
    "Decoder",
    "EncoderDecoder",
    "Hidden",
    "LanguageModel",
    "Output",
    "Recurrent",
    "build",
    "init_weights",
]
