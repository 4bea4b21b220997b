"""The weights of a checkpoint, one at a time: for a model of which this process holds only a part."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from manyhands.checkpoint.assemble import our_tensor
from manyhands.checkpoint.find import open_directory
from manyhands.checkpoint.gguf.files import is_gguf
from manyhands.checkpoint.source import open_source
from manyhands.config.shapes import tensor_shapes
from manyhands.errors import UserError


def each_tensor(directory: str | Path) -> Iterator[tuple[str, Tensor]]:
    """By their names in `state_dict`, as stored.

    A tensor that lies in the files as it is is mapped: whoever needs some rows of it reads no others. Raises
    `CheckpointError`, and `UserError` for packed weights.
    """
    source = open_source(directory) if is_gguf(directory) else open_directory(directory)
    if source.records:
        raise UserError(f"{directory}: packed weights cannot be trained; `manyhands convert` unpacks them")
    for name, shape in tensor_shapes(source.config).items():
        yield name, our_tensor(source, name, shape, None, torch.device("cpu"))
