"""Decoding on load: tensors stored in 8 or 4 bits become the tensors the model's code names.

    fp8                 X float8 [N,K], X_scale_inv: one scale per block            DeepSeek-V3, Kimi K2, MiniMax-M2
    compressed-tensors  X_packed int32, X_scale per group of a row, X_shape         Kimi K2.5 ("pack-quantized")
    mxfp4               X_blocks uint8 [E,R,G,16], X_scales [E,R,G]; X is [E,32G,R] gpt-oss

Files: `tensors.py` says what a checkpoint holds, from headers alone; `config.py` reads `quantization_config`;
`decode.py` is the arithmetic.
"""

from manyhands.checkpoint.quantized.tensors import logical_tensors
from manyhands.checkpoint.tensors import Header, Logical

__all__ = ["Header", "Logical", "logical_tensors"]
