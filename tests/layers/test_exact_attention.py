"""Attention in `exactly`: a row has the bits that it has alone, padded on either side, in chunks of any size."""

import pytest
import torch

from manyhands.config import AttentionConfig, ModelConfig, RopeConfig
from manyhands.kernels import native
from manyhands.kernels.moment import exactly
from manyhands.layers.attention import Attention
from manyhands.layers.cache import ContiguousLayer, LatentLayer
from manyhands.layers.latent_attention import LatentAttention
from manyhands.models.decoder import find_positions

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no native kernels: {native.missing()}")
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
LATENT = {"kind": "mla", "num_attention_heads": 4, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16}
KINDS = {
    "grouped": GROUPED,
    "window, sinks": {**GROUPED, "sliding_window": 7, "sinks": True},
    "latent": {**LATENT, "v_head_dim": 16},
}
L = 30


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_alone_padded_and_in_chunks(kind: str, dtype: torch.dtype) -> None:
    config = ModelConfig(
        hidden_size=48, num_hidden_layers=1, attention=AttentionConfig(**KINDS[kind]), rope=RopeConfig()
    )
    torch.manual_seed(0)
    module = (LatentAttention if kind == "latent" else Attention)(config).to(dtype).eval()
    shapes = ((4, 16), (4, 16), (1, 32), (1, 16)) if kind == "latent" else ((4, 16), (2, 16), (2, 16))
    parts = [torch.randn(3, heads, L, width).to(dtype) for heads, width in shapes]
    real = torch.ones(3, L, dtype=torch.bool)
    real[1, :9], real[2, 25:] = False, False
    with torch.inference_mode(), exactly():
        y, _ = module._core(*parts, find_positions(config, L, L, real, real.device), None)
        for row, begin, end in ((0, 0, L), (1, 9, L), (2, 0, 25)):
            one = [part[row : row + 1, :, begin:end] for part in parts]
            positions = find_positions(config, end - begin, end - begin, None, real.device)
            assert torch.equal(y[row, :, begin:end], module._core(*one, positions, None)[0][0])
            cache, done = LatentLayer() if kind == "latent" else ContiguousLayer(), 0
            for n in (8, 1, end - begin - 9):
                positions = find_positions(config, n, done + n, None, real.device)
                z, _ = module._core(*(part[:, :, done : done + n] for part in one), positions, cache)
                assert torch.equal(y[row, :, begin + done : begin + done + n], z[0])
                done += n
