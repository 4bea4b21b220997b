"""Every kind of attention by itself, in one module, against the oracle: a whole sequence, and to a cache.

B sequences, S tokens, D width.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from manyhands.check import cases
from manyhands.check.compare import close
from manyhands.check.model import DTYPES
from manyhands.check.oracle import float64_copy
from manyhands.check.oracle_attention import attention
from manyhands.check.report import Row, Situation
from manyhands.check.subject import gradients
from manyhands.config import AttentionConfig, ModelConfig, RopeConfig
from manyhands.layers.attention import Attention
from manyhands.layers.cache import ContiguousLayer, LatentLayer
from manyhands.layers.latent_attention import LatentAttention
from manyhands.models.decoder import find_positions

B, D = 3, 48
CHUNKS = (10, 1, 3, 8, 1, 9)
"""Queries at a time: the prompt, then steps on both sides of what the native kernels take."""
S = sum(CHUNKS)
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 32}
"""Of a small base, so that within S tokens every pair turns far enough to tell the frequencies apart."""
LONG = {
    "rope_type": "longrope", "rope_theta": 100.0, "original_max_position_embeddings": 64, "short_mscale": 1.2,
    "long_mscale": 1.3, "short_factor": tuple(1.0 + 0.1 * i for i in range(8)),
    "long_factor": tuple(1.5 + 0.5 * i for i in range(8)),
}  # fmt: skip
"""Two sets of factors. To a cache a sequence stays on one side of the original length."""
MLA = {"kind": "mla", "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}


def _of(attention: dict[str, Any], rope: dict[str, Any] | None = None, **model: Any) -> ModelConfig:
    plain = {"num_attention_heads": 4, "num_key_value_heads": None if "kind" in attention else 2, "head_dim": 16}
    return ModelConfig(
        hidden_size=D,
        num_hidden_layers=1,
        attention=AttentionConfig(**(plain | attention)),
        rope=RopeConfig(**({"rope_theta": 100.0} | (rope or {}))),
        **model,
    )


ATTENTIONS: dict[str, ModelConfig] = {
    "multi-head": _of({"num_key_value_heads": 4}),
    "grouped, biases (Qwen2)": _of({"attention_bias": True}),
    "norm of each head (Qwen3)": _of({"qk_norm": "head"}, rms_norm_eps=1e-2),
    "norm of the full width (OLMoE)": _of({"qk_norm": "full"}),
    "norm after rotation (Hunyuan)": _of({"qk_norm": "head_after_rope"}),
    "window (Mistral)": _of({"sliding_window": 5}),
    "sinks, window, YaRN (gpt-oss)": _of(
        {"sinks": True, "sliding_window": 6, "attention_bias": True, "output_bias": True}, YARN | {"truncate": False}
    ),
    "soft cap (Grok-1)": _of({"attn_logit_softcap": 2.0}),
    "own scale (Granite)": _of({"attention_multiplier": 0.5}),
    "linear rotation": _of({}, {"rope_type": "linear", "factor": 4.0}),
    "YaRN": _of({}, YARN),
    "Llama 3.1 rotation": _of({}, YARN | {"rope_type": "llama3"}),
    "LongRoPE, short (Phi-3.5-MoE)": _of({"attention_bias": True, "output_bias": True}, LONG),
    "LongRoPE, long": _of({}, LONG | {"original_max_position_embeddings": 4, "long_mscale": None, "factor": 8.0}),
    "half rotated (GLM-4.5)": _of({"qk_norm": "head"}, {"partial_rotary_factor": 0.5}),
    "neighbouring pairs": _of({}, {"interleave": True}),
    "latent (Moonlight)": _of(MLA, {"interleave": True}),
    "latent, low-rank queries, YaRN (DeepSeek-V3)": _of(
        MLA | {"q_lora_rank": 32, "latent_norm_eps": 1e-2},
        YARN | {"interleave": True, "mscale": 1.0, "mscale_all_dim": 0.8},
    ),
    "chunks, norm without weights (Llama 4)": _of(
        {"attention_chunk_size": 6, "qk_norm": "unweighted_after_rope"}, {"interleave": True}, rms_norm_eps=1e-2
    ),
    "no rotation, queries by position (Llama 4)": _of({"nope_layers": (0,), "floor_scale": 4, "attn_scale": 0.5}),
    "head width without a kernel": _of({"head_dim": 24, "qk_norm": "head"}),
    "latent width without a kernel": _of(MLA | {"kv_lora_rank": 24, "qk_rope_head_dim": 8}),
    "latent, window, biases": _of(MLA | {"q_lora_rank": 32, "sliding_window": 5, "attention_bias": True}),
}
"""One of each published kind, in small."""


class AttentionCheck:
    """One module; `rows` compares it in one dtype, forward and backward, then in steps to a cache."""

    def __init__(self, name: str, seed: int) -> None:
        self.name, self.config = name, ATTENTIONS[name]
        generator = torch.Generator().manual_seed(seed)
        kind = LatentAttention if self.config.attention.kind == "mla" else Attention
        self.module: Attention | LatentAttention = kind(self.config, 0)
        cases.fill(self.module, "random", generator)
        self.x = torch.randn(B, S, D, generator=generator).bfloat16().float()
        self.probe = torch.randn(B, S, D, generator=generator).bfloat16().float()
        self.mask = torch.ones(B, S, dtype=torch.bool)
        self.mask[1, :4] = False  # padded on the left, as prompts are
        self.mask[2, 19:] = False  # ended early

    def rows(self, dtype: str) -> Iterator[Row]:
        """Whole sequences with gradients; steps to a cache, with padding and without."""
        yield from self._whole(Situation(self.name, "padding", "attention", dtype, "train"))
        for padded in (True, False):
            case = "padding" if padded else "random"
            yield self._cached(Situation(self.name, case, "attention", dtype, "decode"), padded)

    def _oracle(self, p: dict[str, Tensor], x: Tensor, mask: Tensor) -> Tensor:
        return attention(p, "", x, self.config, 0, mask)

    def _whole(self, at: Situation) -> list[Row]:
        module, mask = self.module.float().train(), self.mask
        module.zero_grad(set_to_none=True)
        x = self.x.clone().to(DTYPES[at.dtype]).requires_grad_()
        y, _ = module(x, find_positions(self.config, S, S, mask, x.device))
        (y * self.probe.to(y.dtype) * mask[..., None]).sum().backward()  # type: ignore[no-untyped-call]
        p, x64 = float64_copy(module), self.x.double().requires_grad_()
        right = self._oracle(p, x64, mask)
        (right * self.probe.double() * mask[..., None]).sum().backward()  # type: ignore[no-untyped-call]
        found = gradients(module) | {"x": x.grad}
        expected = {name: p[name].grad for name, _ in module.named_parameters()} | {"x": x64.grad}
        return [
            close(at, "attention", {"y": y[mask]}, {"y": right[mask]}),
            close(at, "attention gradients", found, expected),
        ]

    @torch.inference_mode()
    def _cached(self, at: Situation, padded: bool) -> Row:
        module = self.module.to(DTYPES[at.dtype]).eval()
        cache = LatentLayer() if self.config.attention.kind == "mla" else ContiguousLayer()
        x, mask = self.x.to(DTYPES[at.dtype]), self.mask if padded else torch.ones_like(self.mask)
        right = self._oracle({n: t.detach() for n, t in float64_copy(module).items()}, self.x.double(), mask)
        tested, oracle, start = {}, {}, 0
        for n in CHUNKS:
            part, end = slice(start, start + n), start + n
            positions = find_positions(self.config, n, end, mask[:, :end] if padded else None, x.device)
            y, _ = module(x[:, part], positions, cache)
            name = f"attention of {n} queries at {start} cached"
            tested[name], oracle[name] = y[mask[:, part]], right[:, part][mask[:, part]]
            start = end
        return close(at, "attention to a cache", tested, oracle)
