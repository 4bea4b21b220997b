"""Our own checkpoints: `config.json` is the model's description, tensors have our names, experts are stacked."""

from typing import Any, Literal

from manyhands.config import BuiltConfig, PackedConfig, Strict, parse
from manyhands.config.kinds import ByKind
from manyhands.config.model import BUILT
from manyhands.config.shapes import tensor_shapes
from manyhands.errors import ConfigError
from manyhands.families.base import Family, Json, Piece
from manyhands.families.fields import Fields


class Description(Strict):
    """`config.json`."""

    model_type: Literal["manyhands"] = "manyhands"
    version: Literal[1] = 1
    model: ByKind
    packed: PackedConfig | None = None
    """Of a quantised model: what lies in packed records instead of tensors."""


def read(f: Fields) -> BuiltConfig:
    if f.ignored:
        raise ConfigError(f"{f.where}: every field of manyhands' own files is known: none can be ignored")
    return parse(Description, f.values, f.where).model


def write(config: BuiltConfig) -> Json:
    fields: dict[str, Any] = Description(model=config).model_dump(mode="json", exclude={"packed"})
    return fields


def packed_section(values: Json) -> PackedConfig | None:
    """What of a quantised model is packed, from a `config.json` that `read` has read."""
    section = values.get("packed")
    return None if section is None else parse(PackedConfig, section, "packed")


def _pieces(config: BuiltConfig) -> list[Piece]:
    return [Piece(name, name) for name in tensor_shapes(config)]


MANYHANDS = Family(
    model_type="manyhands",
    architecture="manyhands.Decoder",
    published="models trained with manyhands",
    read=read,
    write=write,
    pieces=_pieces,
    kinds=BUILT,
    nearest=False,
    saved_float32=(
        *(f".router.{name}" for name in ("weight", "bias", "noise_weight", "group_weight", "group_noise_weight")),
        *("e_score_correction_bias", ".l1_steps", ".average_outputs"),
    ),
)
