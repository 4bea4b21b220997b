"""Published storage formats, written from their definitions: weights to stored tensors, and what those decode to.

N rows, K columns, E experts, G groups.
"""

import torch
from torch import Tensor

Stored = dict[str, Tensor]

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"]}
INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True},
            "input_activations": None,
            "output_activations": None,
        }
    },
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*"],
    "kv_cache_scheme": None,
    "quantization_status": "compressed",
}
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def fp8(name: str, weight_NK: Tensor) -> tuple[Stored, Tensor]:
    """DeepSeek's: e4m3 with one float32 scale per block of 128 × 128; the last blocks are ragged."""
    n, k = weight_NK.shape
    scale = torch.empty(-(-n // 128), -(-k // 128))
    codes = torch.empty(n, k, dtype=torch.float8_e4m3fn)
    decoded = torch.empty(n, k)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
            scale[i, j] = weight_NK[block].abs().max() / 448
            codes[block] = (weight_NK[block] / scale[i, j]).to(torch.float8_e4m3fn)
            decoded[block] = codes[block].float() * scale[i, j]
    return {name: codes, f"{name}_scale_inv": scale}, decoded


def int4(name: str, weight_NK: Tensor) -> tuple[Stored, Tensor]:
    """compressed-tensors': groups of 32 along a row, the first of eight values in a word's lowest bits, 0 as 8."""
    n, k = weight_NK.shape
    groups = weight_NK.view(n, k // 32, 32)
    scale = (groups.abs().amax(-1) / 7).to(torch.bfloat16)
    codes = (groups / scale.float()[..., None]).round().clamp(-8, 7) + 0.0  # an integer has no negative zero
    decoded = (codes * scale.float()[..., None]).view(n, k)
    eight = (codes.long() + 8).view(n, k // 8, 8)
    words = sum(eight[..., i] << 4 * i for i in range(8))
    assert isinstance(words, Tensor)
    packed = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    shape = torch.tensor([n, k], dtype=torch.int32)
    return {f"{name}_packed": packed, f"{name}_scale": scale, f"{name}_shape": shape}, decoded


def mxfp4(name: str, weight_EKN: Tensor) -> tuple[Stored, Tensor]:
    """OCP's, as gpt-oss stores it: groups of 32 along K with a power of two each, the first value in a low half."""
    E, K, N = weight_EKN.shape
    groups = weight_EKN.transpose(1, 2).reshape(E, N, K // 32, 32)
    exponent = (groups.abs().amax(-1) / 6).log2().ceil()
    values = groups / exponent.exp2()[..., None]
    nearest = (values.abs()[..., None] - E2M1).abs().argmin(-1)
    decoded = E2M1[nearest] * values.sign() * exponent.exp2()[..., None]
    codes = (nearest + 8 * (values < 0)).to(torch.uint8).view(E, N, K // 32, 16, 2)
    stored = {f"{name}_blocks": codes[..., 0] | codes[..., 1] << 4, f"{name}_scales": (exponent + 127).to(torch.uint8)}
    return stored, decoded.view(E, N, K).transpose(1, 2).contiguous()
