"""What is read of a checkpoint, where all of it would be too much: tensors to look through, slices, single experts.

E experts, D width, F expert width.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from manyhands.check.shrink import shrink
from manyhands.checkpoint.assemble import our_tensor
from manyhands.checkpoint.source import Source
from manyhands.checkpoint.tensors import DTYPES
from manyhands.config.activation import GATED
from manyhands.config.shapes import Shape, tensor_shapes

MOST_BYTES = 2 << 30
"""Stored bytes that are looked through: seconds from memory, half a minute from a slow disk."""
PIECE_VALUES = 1 << 24
"""Values decoded at a time."""


def finite(source: Source, budget: int = MOST_BYTES) -> Iterator[tuple[str, bool, int]]:
    """(tensor, whether it is finite, bytes read) as the checkpoint names them: the small ones first, then the others
    from evenly spaced places, until the budget is spent."""
    stored = source.files.stored
    sizes = {name: sum(stored[p].size for p in logical.parts) for name, logical in source.logical.items()}
    names = sorted(sizes, key=lambda name: sizes[name])
    small = [name for name in names if sizes[name] <= 1 << 20]
    large = sorted(names[len(small) :])
    stride = next(n for n in (1597, 377, 89, 13, 1) if n == 1 or len(large) % n)  # no divisor: every one is met once
    spent, met = 0, set[str]()
    for name in small + [large[i * stride % len(large)] for i in range(len(large))]:
        new = set(source.logical[name].parts) - met  # one record holds several tensors
        size = sum(stored[part].size for part in new)
        if spent + size > budget and spent:
            continue
        spent, met = spent + size, met | new
        yield name, _finite(source, name), size
        source.release(name)


def _finite(source: Source, name: str) -> bool:
    logical = source.logical[name]
    parts = [source.files.tensor(part) for part in logical.parts]
    shape = logical.header.shape
    if logical.decode is None:
        pieces_of = torch.split(parts[0].reshape(-1), PIECE_VALUES)
        return all(bool(piece.float().isfinite().all()) for piece in pieces_of)
    stacked = len(shape) == 3 and all(part.ndim and len(part) == shape[0] for part in parts)
    pieces = [[part[e : e + 1] for part in parts] for e in range(shape[0])] if stacked else [parts]
    for piece in pieces:
        out = torch.empty((1, *shape[1:]) if stacked else shape, dtype=torch.float32)
        logical.decode(piece, out)
        if not bool(out.isfinite().all()):
            return False
    return True


def expert(source: Source, name: str, e: int, shape: Shape) -> Tensor:
    """Expert `e` of our stacked tensor `name`, whose shape without E is `shape`, float32; nothing else is read."""
    out = torch.empty(shape)
    for piece in source.pieces[name]:
        one = bool(piece.ours_index) and isinstance(piece.ours_index[0], int)
        if one and piece.ours_index[0] != e:
            continue
        target = out[piece.ours_index[1:]]
        target = target.transpose(-2, -1) if piece.transpose else target
        if one:
            target.copy_(source.value(piece.theirs)[piece.theirs_index])
        else:
            target.copy_(_of_stack(source, piece.theirs, e)[piece.theirs_index[1:]])
        source.release(piece.theirs)
    return out


def _of_stack(source: Source, theirs: str, e: int) -> Tensor:
    logical = source.logical[theirs]
    parts = [source.files.tensor(part) for part in logical.parts]
    if logical.decode is None:
        return parts[0][e]
    out = torch.empty((1, *logical.header.shape[1:]), dtype=torch.float32)
    logical.decode([part[e : e + 1] for part in parts], out)
    return out[0]


def spread(count: int, of: int) -> list[int]:
    """`count` numbers below `of`, the first and the last among them."""
    return [i * (of - 1) // max(count - 1, 1) for i in range(count)]


def slices(source: Source) -> tuple[dict[str, Tensor], str]:
    """A state for `shrink(config)` cut from the checkpoint's own weights, and what it was cut from, in words.

    The first rows and columns of every tensor, of the first layers and the last, and of experts evenly spaced.
    """
    config = source.decoder("reading its own weights in part")
    small = shrink(config)
    shapes, wanted = tensor_shapes(config), tensor_shapes(small)
    same_kind = [
        n
        for n in range(config.num_hidden_layers)
        if config.is_sparse(n) == small.is_sparse(small.num_hidden_layers - 1)
        and config.layer_types[n] == small.layer_types[-1]
        and (n in config.attention.nope_layers) == (small.num_hidden_layers - 1 in small.attention.nope_layers)
    ]
    layers = [*range(small.num_hidden_layers - 1), same_kind[-1]]
    chosen: list[int] = []
    if config.moe is not None and small.moe is not None:
        chosen = spread(small.moe.router.num_experts, config.moe.router.num_experts)
    state = {}
    for name, shape in wanted.items():
        theirs = name
        if name.startswith("layers."):
            _, layer, tail = name.split(".", 2)
            theirs = f"layers.{layers[int(layer)]}.{tail}"
        state[name] = _slice(source, theirs, shapes[theirs], shape, chosen)
    said = f"layers {', '.join(map(str, layers))} of {config.num_hidden_layers}"
    said += f", experts {', '.join(map(str, chosen))} of {config.moe.router.num_experts}" if config.moe else ""
    return state, f"{said}, cut to {small.hidden_size} of {config.hidden_size} wide"


def _slice(source: Source, name: str, whole: Shape, shape: Shape, chosen: list[int]) -> Tensor:
    if ".mlp.experts." in name:
        gated = source.config.moe is not None and source.config.moe.hidden_act in GATED
        halves = gated and "up_proj" in name
        return torch.stack([_cut(expert(source, name, e, whole[1:]), shape[1:], halves) for e in chosen])
    tensor = our_tensor(source, name, whole, None, torch.device("cpu"))
    if ".mlp.router." in name:
        return _cut(tensor[chosen].float(), shape, False)
    cut = _cut(tensor, shape, False)
    for piece in source.pieces[name]:
        source.release(piece.theirs)
    return cut


def _cut(tensor: Tensor, shape: Shape, halves: bool) -> Tensor:
    """The first entries along every dimension; of both halves of the first, the gate's and the other's."""
    if halves:
        gate, up = tensor.chunk(2, 0)
        half = (shape[0] // 2, *shape[1:])
        return torch.cat((_cut(gate, half, False), _cut(up, half, False)))
    return tensor[tuple(slice(0, n) for n in shape)].clone()


def values(source: Source) -> int:
    """Numbers in the whole model."""
    return sum(torch.Size(shape).numel() for shape in tensor_shapes(source.config).values())


def stored_dtype(source: Source) -> torch.dtype:
    """What most of the model computes in."""
    name = source.pieces["norm.weight"][0].theirs
    return DTYPES[source.logical[name].header.dtype]
