"""Whole models, a file for each kind, and how they are initialised. Start with `decoder.py`."""

from manyhands.models.build import AnyModel, LanguageModel, build
from manyhands.models.decoder import Decoder, Hidden, Output
from manyhands.models.encoder_decoder import EncoderDecoder
from manyhands.models.hierarchical_experts import HierarchicalExperts
from manyhands.models.init import init_weights
from manyhands.models.local_experts import LocalExperts
from manyhands.models.recurrent import Recurrent

__all__ = [
    "AnyModel",
    "Decoder",
    "EncoderDecoder",
    "Hidden",
    "HierarchicalExperts",
    "LanguageModel",
    "LocalExperts",
    "Output",
    "Recurrent",
    "build",
    "init_weights",
]
