"""A packed checkpoint with random weights: for measuring speed, which does not depend on what they are.

Any bytes are int8 or int4 weights; scales and floats are drawn. Every expert of a layer is alike.
"""

from pathlib import Path

import torch
from torch import Tensor

from manyhands.checkpoint.files import building
from manyhands.checkpoint.packed import packed_headers, records_of, write_packed
from manyhands.checkpoint.tensors import DTYPES
from manyhands.config import ModelConfig, PackedConfig
from manyhands.quant.record import PAGE


def write_random_packed(directory: Path, config: ModelConfig, packed: PackedConfig, seed: int = 0) -> None:
    """Write it at `directory`, which must not exist. Raises `ConfigError` for sizes that no record has."""
    records = {record.name: record for record in records_of(config, packed)}
    generator = torch.Generator().manual_seed(seed)

    def dtype_of(name: str) -> torch.dtype:
        return torch.float32 if ".router." in name else torch.bfloat16

    headers = packed_headers(config, packed, dtype_of)

    def value(name: str) -> Tensor:
        header = headers[name]
        if name not in records:
            out = torch.empty(header.shape, dtype=DTYPES[header.dtype])
            return out.fill_(1.0) if "norm" in name else out.normal_(0.0, 0.02, generator=generator)
        layout = records[name].layout
        assert layout.record_bytes % PAGE == 0
        out = torch.zeros(header.shape, dtype=torch.uint8)  # between the sections a record holds zeros
        stacked = out.view(-1, layout.record_bytes)
        for section, (start, length) in layout.sections.items():
            dtype = {"bf16": torch.bfloat16, "float32": torch.float32}.get(layout.format)
            if "scales" in section:
                dtype, scale = (torch.bfloat16, 0.004) if layout.format == "int4" else (torch.float32, 0.0003)
            else:
                scale = 0.02
            if dtype is None:
                piece = torch.randint(-127, 128, (length,), dtype=torch.int8, generator=generator).view(torch.uint8)
            else:
                drawn = torch.empty(length // dtype.itemsize, dtype=dtype)
                piece = drawn.normal_(0.0, scale, generator=generator).view(torch.uint8)
            stacked[:, start : start + length] = piece
        return out

    with building(directory) as partial:
        write_packed(partial, config, packed, dtype_of, value)
