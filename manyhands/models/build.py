"""A model from its description, whatever its kind."""

from manyhands.config import BuiltConfig, EncoderDecoderConfig, ModelConfig
from manyhands.models.decoder import Decoder
from manyhands.models.encoder_decoder import EncoderDecoder
from manyhands.models.recurrent import Recurrent

LanguageModel = Decoder | Recurrent
"""What predicts every next token of a text: `hidden(ids, mask, cache, …)`, `head`, `head_weight`."""
AnyModel = LanguageModel | EncoderDecoder
"""What is trained, saved and loaded: `config`, `sparse_layers()`, `embed_tokens`."""


def build(config: BuiltConfig, experts_implementation: str = "auto") -> AnyModel:
    """A model with fresh weights from torch's global generator; `init_weights` takes a seed.

    Raises `ConfigError` for a description that is only counted.
    """
    if isinstance(config, ModelConfig):
        return Decoder(config, experts_implementation)
    if isinstance(config, EncoderDecoderConfig):
        return EncoderDecoder(config, experts_implementation)
    return Recurrent(config, experts_implementation)
