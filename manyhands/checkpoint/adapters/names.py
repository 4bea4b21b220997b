"""Where a family's files, and the modules of transformers, have what LoRA adds to our matrices.

    form         module                                              rows of
    per expert   model.layers.3.mlp.experts.7.gate_proj              one expert's gate
    fused        model.layers.3.mlp.experts                          all experts: gate and up, and down
    (linear)     model.layers.3.self_attn.q_proj                     a linear layer

A part is one of our matrices, as in `manyhands.models.adapted`. Modules of the first and third kind are named as in
the family's files, which PEFT reads by transformers' own renaming; of the second as in transformers 5's memory.

E experts, F expert width.
"""

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from manyhands.config import BuiltConfig, ModelConfig
from manyhands.config.decoder import as_decoder
from manyhands.config.shapes import Shape, tensor_shapes
from manyhands.errors import ConfigError
from manyhands.families import FAMILIES, Family, Piece, nearest

PREFIX = "base_model.model."
"""Before every name in PEFT's files."""
_MATRICES = ("gate_up_proj", "up_proj", "down_proj")
_LAYER = re.compile(r"(.*\blayers\.\d+\.)")


@dataclass(frozen=True, slots=True)
class Place:
    """What of a part one module holds: all of a linear layer, or some rows of one expert."""

    part: str
    expert: int | None
    rows: slice


@dataclass(frozen=True, slots=True)
class Names:
    """Of one model."""

    family: Family
    shapes: dict[str, Shape] = field(default_factory=dict)
    """Part -> [out, in] or [E, out, in]."""
    modules: dict[str, Place] = field(default_factory=dict)
    """Linear layers, and experts one by one."""
    stacks: dict[str, dict[str, str]] = field(default_factory=dict)
    """Module of all experts of a layer -> name of its parameter -> part."""
    order: dict[str, Tensor] = field(default_factory=dict)
    """Part -> [out]: which of our rows each of theirs is, where the order differs."""
    transposed: set[str] = field(default_factory=set)
    """Parts that are [E, in, out] there."""

    def modules_of(self, part: str) -> dict[str, Place]:
        """Of one part, in the family's order."""
        return {module: place for module, place in self.modules.items() if place.part == part}

    def stack_of(self, part: str) -> tuple[str, str] | None:
        """The module that holds a part of all experts together, and the parameter; None where there is none."""
        for module, parameters in self.stacks.items():
            for parameter, of in parameters.items():
                if of == part:
                    return module, parameter
        return None


def part_shapes(config: BuiltConfig) -> Iterator[tuple[str, str, Shape]]:
    """(part, our tensor, shape) of every matrix that can have LoRA, as `models.adapted.parts_of` finds them."""
    for name, shape in tensor_shapes(config).items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and "_proj" in module.rpartition(".")[2]:
            yield module, name, shape
        elif module.endswith(".experts") and leaf in _MATRICES:
            yield name, name, shape


def names_of(family: Family, config: BuiltConfig) -> Names:
    """Raises `ConfigError` for a model that is no decoder."""
    decoder: ModelConfig = as_decoder(config, "an adapter in PEFT's files")
    found = Names(family)
    parts = {tensor: part for part, tensor, _ in part_shapes(decoder)}
    found.shapes.update({part: shape for part, _, shape in part_shapes(decoder)})
    for piece in family.pieces(decoder):
        if (part := parts.get(piece.ours)) is not None:
            _add(found, part, piece)
    return found


def _add(found: Names, part: str, piece: Piece) -> None:
    module = piece.theirs.removesuffix(".weight")
    if piece.ours_index and isinstance(piece.ours_index[0], int):
        rows = piece.ours_index[1] if len(piece.ours_index) > 1 else slice(None)
        assert isinstance(rows, slice) and not piece.transpose and not piece.theirs_index
        found.modules[module] = Place(part, piece.ours_index[0], rows)
        if (layer := _LAYER.match(module)) is not None:
            found.stacks.setdefault(f"{layer[1]}mlp.experts", {})[part.rpartition(".")[2]] = part
    elif len(found.shapes[part]) == 2:
        assert not piece.ours_index and not piece.theirs_index and not piece.transpose, piece
        found.modules[module] = Place(part, None, slice(None))
    elif module.rpartition(".")[2] in _MATRICES:
        stack, _, parameter = module.rpartition(".")
        found.stacks.setdefault(stack, {})[parameter] = part
        if piece.transpose:
            found.transposed.add(part)
        _order(found, part, piece)


def _order(found: Names, part: str, piece: Piece) -> None:
    """gpt-oss has rows of gate and up in turn."""
    if not piece.ours_index:
        return
    rows = found.shapes[part][1]
    ours, theirs = piece.ours_index[1], piece.theirs_index[-1 if piece.transpose else 1]
    order = found.order.setdefault(part, torch.zeros(rows, dtype=torch.int64))
    order[theirs] = torch.arange(rows)[ours]


def candidates(family: Family, config: BuiltConfig) -> list[Names]:
    """How an adapter of a model may be named: as its family does, or as the one that our own models are written as.

    Of a GGUF file as the family does in its own files: the names that PEFT knows.
    """
    family = FAMILIES[family.model_type]
    found = [names_of(family, config)]
    if family.model_type == "manyhands":
        with suppress(ConfigError):  # no published family may say what this model is
            found.insert(0, names_of(nearest(config), config))
    return found


def written_as(family: Family | None, config: BuiltConfig) -> Names:
    """The first of them; `family` None: a model that came from no files."""
    return candidates(FAMILIES["manyhands"] if family is None else family, config)[0]
