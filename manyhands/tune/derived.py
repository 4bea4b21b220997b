"""A checkpoint some of whose tensors are not in its files: computed from them, or picked out of them.

What comes out is a `Source` like any other: it is loaded, sized and written by the code that reads files, one tensor at
a time, and nothing is computed before it is asked for.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from manyhands.checkpoint.source import Source
from manyhands.checkpoint.tensors import NAMES, Header, Logical
from manyhands.config import ModelConfig
from manyhands.config.shapes import tensor_shapes
from manyhands.families import Piece


@dataclass(frozen=True, slots=True)
class Computed:
    """A tensor that is made when it is read."""

    fill: Callable[[Tensor], None]
    """Writes it into the tensor it is given."""
    dtype: torch.dtype
    reads: tuple[str, ...] = ()
    """The logical tensors of the source that it is made of; for the receipt."""


Change = Computed | list[Piece]
"""What one of our tensors is now: computed, or made of these pieces of the files."""


def derived(source: Source, config: ModelConfig, changes: Mapping[str, Change]) -> Source:
    """`source` as a model described by `config`: tensors as `changes` say, all others as they were.

    Every tensor of `config` must be in `changes` or, with the same shape, in the source.
    """
    shapes, before = tensor_shapes(config), tensor_shapes(source.config)
    logical, pieces = dict(source.logical), dict[str, list[Piece]]()
    for name, shape in shapes.items():
        change = changes.get(name)
        if change is None:
            assert before.get(name) == shape, name
            pieces[name] = source.pieces[name]
        elif isinstance(change, Computed):
            parts = dict.fromkeys(part for theirs in change.reads for part in source.logical[theirs].parts)
            logical[computed_name(name)] = Logical(Header(NAMES[change.dtype], shape), tuple(parts), _decode(change))
            pieces[name] = [Piece(name, computed_name(name))]
        else:
            pieces[name] = change
    return replace(source, config=config, logical=logical, pieces=pieces, packed=None, records={})


def computed_name(ours: str) -> str:
    """What a computed tensor is called among the logical ones, where no file can have that name."""
    return f"{ours} (computed)"


def read_by(source: Source, names: Iterable[str]) -> tuple[str, ...]:
    """The logical tensors that these of ours are made of."""
    return tuple(dict.fromkeys(piece.theirs for name in names for piece in source.pieces[name]))


def _decode(change: Computed) -> Callable[..., None]:
    def decode(_: object, out: Tensor) -> None:
        change.fill(out)

    return decode
