"""Small random models of every family that llama.cpp has, with a tokenizer: for tests and benchmarks/gguf_parity.py.

The weights keep activations near 1, so that routers choose and logits differ.
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch

from manyhands.checkpoint.model import save
from manyhands.config import ModelConfig
from manyhands.models import Decoder
from manyhands.text import Tokenizer
from manyhands.text.pretokenizers import Pre

V, D, E = 320, 64, 8
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
_NORM = _HEADS | {"qk_norm": "head"}
_MLA = {
    "kind": "mla", "num_attention_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16, "v_head_dim": 32, "latent_norm_eps": 1e-6,
}  # fmt: skip
_SIGMOID = {"score": "sigmoid", "bias": True, "routed_scaling_factor": 1.8}
_LED: dict[str, Any] = {"n_shared_experts": 1, "first_k_dense_replace": 1}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64, "rope_theta": 5000.0}
_YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "mscale": 0.7, "mscale_all_dim": 0.7,
}  # fmt: skip


def _model(attention: dict[str, Any], moe: dict[str, Any] | None = None, router: Any = None, **more: Any) -> Any:
    values: dict[str, Any] = {
        "vocab_size": V, "hidden_size": D, "num_hidden_layers": 3, "intermediate_size": 96,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "attention": attention,
    }  # fmt: skip
    if router is not None:
        values["moe"] = {
            "moe_intermediate_size": 32,
            "router": {"num_experts": E, "num_experts_per_tok": 3} | router,
        } | (moe or {})
    return values | more


_HALF = {"norm_topk_prob": False}
MODELS: dict[str, dict[str, Any]] = {
    "llama": _model(_HEADS),
    "llama, 3.1's rotation": _model(_HEADS, rope=_LLAMA3, tie_word_embeddings=True),
    "qwen3": _model(_NORM),
    "mixtral": _model(_HEADS, {}, {}),
    "deepseek": _model(_HEADS | {"head_dim": 16}, _LED, _HALF),
    "deepseek_v2": _model(_MLA, _LED, _HALF, rms_norm_eps=1e-6, rope={"interleave": True}),
    "deepseek_v3": _model(
        _MLA, _LED, _SIGMOID | {"n_group": 4, "topk_group": 2}, rms_norm_eps=1e-6, rope={"interleave": True} | _YARN
    ),
    "qwen2_moe": _model(
        _HEADS | {"head_dim": 16, "attention_bias": True},
        {"n_shared_experts": 1, "shared_expert_intermediate_size": 96, "shared_expert_gate": True},
        _HALF,
    ),
    "qwen3_moe": _model(_NORM, {}, {}),
    "olmoe": _model({"num_attention_heads": 4, "head_dim": 16, "qk_norm": "full"}, {}, _HALF),
    "gpt_oss": _model(
        _HEADS
        | {
            "attention_bias": True, "output_bias": True, "sinks": True, "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        {"hidden_act": "swiglu_oai", "expert_bias": True},
        {"logit_bias": True},
        hidden_act="swiglu_oai",
    ),
    "glm4_moe": _model(_NORM | {"attention_bias": True}, _LED, _SIGMOID, rope={"partial_rotary_factor": 0.5}),
    "dots1": _model(_NORM | {"num_key_value_heads": 4}, _LED, _SIGMOID),
    "granitemoe": _model(
        _HEADS | {"head_dim": 16, "attention_multiplier": 0.2},
        {},
        {},
        embedding_multiplier=2.0,
        residual_multiplier=0.5,
        output_multiplier=0.25,
    ),
    "ernie4_5_moe": _model(_HEADS, _LED | {"n_shared_experts": 2}, {"bias": True}, rope={"interleave": True}),
    "hunyuan_v1_moe": _model(_HEADS | {"qk_norm": "head_after_rope"}, {"n_shared_experts": 1}, {}),
    "minimax_m2": _model(
        _HEADS | {"qk_norm": "full"}, {}, {"score": "sigmoid", "bias": True}, rope={"partial_rotary_factor": 0.5}
    ),
}  # fmt: skip
"""Case -> model; the family is what stands before the comma."""


def family_of(case: str) -> str:
    """Its `model_type`."""
    return case.partition(",")[0]


@cache
def tokenizer(pre: Pre | None = "llama-bpe") -> Tokenizer:
    """Learned from the English below: some 300 tokens."""
    text = Path(__file__).read_text(encoding="utf-8")
    return Tokenizer.train([text], V, pre)


def randomise(model: Decoder, seed: int = 0) -> Decoder:
    """Weights of unit gain, norms and biases away from their beginnings."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("norm.weight"):
                tensor.copy_(1 + 0.2 * noise)
            elif tensor.dim() < 2 or name.endswith(("_bias", ".bias")):
                tensor.copy_(0.2 * noise)
            else:
                tensor.copy_(noise * (2.0 if "router" in name or "lm_head" in name else 1.0) / tensor.shape[-1] ** 0.5)
    return model.eval()


def saved(case: str, directory: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    """The model of a case, written in its family's own format with the tokenizer."""
    model = randomise(Decoder(ModelConfig.model_validate(MODELS[case])))
    save(model, directory, tokenizer(), family=family_of(case), dtype=dtype)
    return model
