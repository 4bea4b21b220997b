"""The kinds of models that are built, as one type: what a run and a checkpoint of our own may describe."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Discriminator, Tag

from manyhands.config.decoder import ModelConfig
from manyhands.config.encoder_decoder import EncoderDecoderConfig
from manyhands.config.model import BUILT, DECODER
from manyhands.config.recurrent import RecurrentConfig

BuiltConfig = ModelConfig | EncoderDecoderConfig | RecurrentConfig
"""A model of a kind in `BUILT`. Each has `vocab_size`, `hidden_size`, `moe`, `sparse_layers`, `tie_word_embeddings`."""


def _tag(values: Any) -> str:
    """By which class values are read. That of a decoder says what is wrong with a kind that is not built."""
    kind = values.get("kind", DECODER) if isinstance(values, Mapping) else getattr(values, "kind", DECODER)
    return kind if isinstance(kind, str) and kind in BUILT else DECODER


ByKind = Annotated[
    Annotated[ModelConfig, Tag(DECODER)]
    | Annotated[EncoderDecoderConfig, Tag("encoder_decoder")]
    | Annotated[RecurrentConfig, Tag("recurrent")],
    Discriminator(_tag),
]
"""`BuiltConfig` as a field of a description: read by its `kind`."""


def longest_sequence(config: BuiltConfig) -> int | None:
    """Tokens of the longest sequence that the model takes; None: any."""
    return config.max_position_embeddings if isinstance(config, ModelConfig) else None
