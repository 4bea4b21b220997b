"""GGUF as a description: its header, and what its names and keys say in ours, both ways. Nothing here needs torch.

    header.py   the file's own table of contents, checked whole before anything is allocated
    series.py   a model in several files
    types.py    how many bytes a block of each number format takes
    names.py    our tensor names <-> GGUF's
    archs.py    `general.architecture` <-> `model_type`, key by key
    fields.py   a header -> the fields of a `config.json`
    written.py  a model -> keys and tensors, if llama.cpp computes the same

The tensors themselves are `checkpoint/gguf/`'s.
"""

from manyhands.families.gguf.archs import ARCHS, Arch
from manyhands.families.gguf.fields import config_fields
from manyhands.families.gguf.header import GgufHeader, TensorInfo, read_gguf_header
from manyhands.families.gguf.names import gguf_name, pieces
from manyhands.families.gguf.series import gguf_in, is_gguf, read_series

__all__ = [
    "ARCHS",
    "Arch",
    "GgufHeader",
    "TensorInfo",
    "config_fields",
    "gguf_in",
    "gguf_name",
    "is_gguf",
    "pieces",
    "read_gguf_header",
    "read_series",
]
