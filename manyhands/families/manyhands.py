"""Our own checkpoints: `config.json` is the model's description, tensors have our names, experts are stacked."""

from typing import Any, Literal

from manyhands.config import ModelConfig, Strict, parse
from manyhands.config.shapes import tensor_shapes
from manyhands.families.base import Family, Json, Piece
from manyhands.families.fields import Fields


class Description(Strict):
    """`config.json`."""

    model_type: Literal["manyhands"] = "manyhands"
    version: Literal[1] = 1
    model: ModelConfig


def read(f: Fields) -> ModelConfig:
    return parse(Description, f.values, f.where).model


def write(config: ModelConfig) -> Json:
    fields: dict[str, Any] = Description(model=config).model_dump(mode="json")
    return fields


def _pieces(config: ModelConfig) -> list[Piece]:
    return [Piece(name, name) for name in tensor_shapes(config)]


MANYHANDS = Family(
    model_type="manyhands",
    architecture="manyhands.Decoder",
    published="models trained with manyhands",
    read=read,
    write=write,
    pieces=_pieces,
    saved_float32=(".router.weight", ".router.bias", ".router.noise_weight", "e_score_correction_bias"),
)
