"""Which number format each tensor of a GGUF file has, and its bytes, a piece at a time.

    f32, bf16   every matrix
    q8_0        every matrix
    q4_0        every matrix but the embedding and the head, which are q8_0
    mxfp4       the experts; every other matrix is q8_0

Vectors, routers and the experts' biases are float32 throughout. A matrix whose rows are not whole blocks is float16.
The blocks are those of the `gguf` package's own quantiser, which are llama.cpp's reference ones.
"""

from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from manyhands.config.shapes import Shape
from manyhands.families.gguf.types import NUMBERS, TYPES, BlockType

FileType = Literal["f32", "bf16", "q8_0", "q4_0", "mxfp4"]
FILE_TYPES: tuple[FileType, ...] = get_args(FileType)
FTYPES: dict[FileType, int] = {"f32": 0, "q4_0": 2, "q8_0": 7, "bf16": 32, "mxfp4": 38}
"""`general.file_type`: llama.cpp's names for the mixture."""
_FLOAT32 = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", ".bias", "attn_sinks.weight", "rope_freqs.weight")
_CHUNK = 1 << 22
"""Values encoded at once."""


def block_type(name: str, shape: Shape, file_type: FileType) -> BlockType:
    """The format of one tensor."""
    if len(shape) == 1 or name.endswith(_FLOAT32):
        return TYPES[NUMBERS["F32"]]
    wanted = file_type.upper()
    if file_type == "q4_0" and name in ("token_embd.weight", "output.weight"):
        wanted = "Q8_0"
    if file_type == "mxfp4" and not name.endswith("_exps.weight"):
        wanted = "Q8_0"
    found = TYPES[NUMBERS[wanted]]
    return TYPES[NUMBERS["F16"]] if shape[-1] % found.values else found


def encoded(tensor: Tensor, block: BlockType) -> Iterator[tuple[bytes, float, float]]:
    """The bytes of `tensor` [.., K] in the order of the file, piece by piece, with the sums of the squared error that
    the format made and of the squares of the values."""
    matrix = tensor.reshape(-1, tensor.shape[-1])
    rows = max(1, _CHUNK // matrix.shape[1])
    for start in range(0, len(matrix), rows):
        part = matrix[start : start + rows]
        values = part.to(torch.float32).contiguous()
        exact = block.name == "F32" or (block.name, part.dtype) == ("BF16", torch.bfloat16)
        if exact and block.name == "BF16":
            yield part.contiguous().view(torch.int16).numpy().tobytes(), 0.0, float(values.double().square().sum())
        elif exact:
            yield values.numpy().tobytes(), 0.0, float(values.double().square().sum())
        else:
            data = _quantized(values, block)
            back = torch.from_numpy(_dequantized(data, block))
            error = float((back - values).double().square().sum())
            yield data.tobytes(), error, float(values.double().square().sum())


def _quantized(values: Tensor, block: BlockType) -> Any:
    from gguf import GGMLQuantizationType, quants

    return quants.quantize(values.numpy(), GGMLQuantizationType[block.name])


def _dequantized(data: Any, block: BlockType) -> Any:
    from gguf import GGMLQuantizationType, quants

    return quants.dequantize(data, GGMLQuantizationType[block.name])
