"""A published family's directory as GGUF, as llama.cpp's `conversion/` writes it: names, orders and keys spelled out.

Written for the tests alone and from that source, not from the tables of the package, which it is to check.
"""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

ARCH = {
    "llama": "llama", "mixtral": "llama", "qwen3": "qwen3", "qwen3_moe": "qwen3moe", "qwen2_moe": "qwen2moe",
    "olmoe": "olmoe", "deepseek": "deepseek", "deepseek_v2": "deepseek2", "deepseek_v3": "deepseek2",
    "kimi_k2": "deepseek2", "gpt_oss": "gpt-oss", "glm4_moe": "glm4moe", "dots1": "dots1", "granitemoe": "granitemoe",
    "ernie4_5_moe": "ernie4_5-moe", "hunyuan_v1_moe": "hunyuan-moe", "minimax_m2": "minimax-m2", "grok-1": "grok",
}  # fmt: skip
PERMUTED = ("llama", "mixtral", "deepseek", "granitemoe")
LATENT = ("deepseek_v2", "deepseek_v3", "kimi_k2")
TOP = {
    "embed_tokens.weight": "token_embd",
    "lm_head.weight": "output",
    "norm.weight": "output_norm",
    "norm": "output_norm",
}
IN_LAYER = {
    "input_layernorm": "attn_norm", "pre_attn_norm": "attn_norm", "post_attn_norm": "attn_output_norm",
    "pre_moe_norm": "ffn_norm", "post_moe_norm": "layer_output_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "attn.q_proj": "attn_q", "attn.k_proj": "attn_k", "attn.v_proj": "attn_v",
    "attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "self_attn.query_layernorm": "attn_q_norm", "self_attn.key_layernorm": "attn_k_norm",
    "self_attn.q_a_proj": "attn_q_a", "self_attn.q_a_layernorm": "attn_q_a_norm", "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa", "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp", "mlp.gate.wg": "ffn_gate_inp",
    "mlp.router": "ffn_gate_inp", "block_sparse_moe.gate": "ffn_gate_inp", "moe_block.gate": "ffn_gate_inp",
    "block_sparse_moe.router.layer": "ffn_gate_inp", "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
}  # fmt: skip
SHARED = ("shared_experts", "shared_expert", "shared_mlp")
GATE, UP, DOWN = ("gate_proj", "w1", "linear"), ("up_proj", "w3", "linear_v"), ("down_proj", "w2", "linear_1")


def permute(x: Tensor, heads: int) -> Tensor:
    """As `LlamaModel.permute`."""
    return x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def tensors_of(directory: Path, c: dict[str, Any]) -> dict[str, Tensor]:
    """Every tensor under GGUF's name."""
    family, found = c["model_type"], {}
    experts: dict[str, dict[int, Tensor]] = {}
    for name, x in load_file(directory / "model.safetensors").items():
        name = name.removeprefix("model.").removesuffix(".scale")
        if name in TOP:
            found[f"{TOP[name]}.weight"] = x
            continue
        layer, tail = name.split(".", 2)[1:]
        block = f"blk.{layer}."
        stem, _, ending = tail.rpartition(".")
        if tail in IN_LAYER and tail.endswith("_norm"):
            stem, ending = tail, "weight"
        part = stem.rpartition(".")[2]
        if family in PERMUTED and part in ("q_proj", "k_proj"):
            x = permute(x, c["num_key_value_heads"] if part == "k_proj" else c["num_attention_heads"])
        if tail.endswith("e_score_correction_bias"):
            found[block + "exp_probs_b.bias"] = x.squeeze()
        elif tail == "self_attn.sinks":
            found[block + "attn_sinks.weight"] = x
        elif family == "gpt_oss" and tail.startswith("mlp.experts."):
            bias = tail.endswith("_bias")
            kind = "bias" if bias else "weight"
            x = x if bias else x.transpose(1, 2)
            if "gate_up" in tail:
                found[f"{block}ffn_gate_exps.{kind}"], found[f"{block}ffn_up_exps.{kind}"] = x[:, ::2], x[:, 1::2]
            else:
                found[f"{block}ffn_down_exps.{kind}"] = x
        elif family == "granitemoe" and "_linear" in stem:
            if "input" in stem:
                found[f"{block}ffn_gate_exps.weight"], found[f"{block}ffn_up_exps.weight"] = x.chunk(2, 1)
            else:
                found[f"{block}ffn_down_exps.weight"] = x
        elif ".experts." in tail:
            number = int(tail.split(".experts.")[1].split(".")[0])
            half = "gate" if part in GATE else "up" if part in UP else "down"
            experts.setdefault(f"{block}ffn_{half}_exps.weight", {})[number] = x
        elif any(f".{shared}." in f".{tail}" for shared in SHARED):
            half = "gate" if part in GATE else "up" if part in UP else "down"
            found[f"{block}ffn_{half}_shexp.weight"] = x
        elif part == "kv_b_proj":
            kv = x.view(c["num_attention_heads"], c["qk_nope_head_dim"] + c["v_head_dim"], -1)
            found[block + "attn_k_b.weight"] = kv[:, : c["qk_nope_head_dim"]].transpose(1, 2)
            found[block + "attn_v_b.weight"] = kv[:, c["qk_nope_head_dim"] :]
        else:
            theirs = IN_LAYER[stem]
            if family in ("gpt_oss", "glm4_moe") and theirs == "ffn_norm":
                theirs = "post_attention_norm"
            found[f"{block}{theirs}.{ending}"] = x.squeeze()
    for name, by_number in experts.items():
        found[name] = torch.stack([by_number[e] for e in sorted(by_number)])
    return found


def keys_of(c: dict[str, Any]) -> dict[str, Any]:
    """Every key of the architecture, without its prefix."""
    family, heads = c["model_type"], c["num_attention_heads"]
    rope = c.get("rope_parameters") or {}
    head_dim = c.get("head_dim") or c["hidden_size"] // heads
    width = c.get("moe_intermediate_size") or c.get("intermediate_size")
    first = lambda *names: next((c[n] for n in names if c.get(n) is not None), None)  # noqa: E731
    keys: dict[str, Any] = {
        "block_count": c["num_hidden_layers"],
        "context_length": c["max_position_embeddings"],
        "embedding_length": c["hidden_size"],
        "feed_forward_length": c["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": 1 if family in LATENT else c.get("num_key_value_heads", heads),
        "attention.layer_norm_rms_epsilon": float(c["rms_norm_eps"]),
        "rope.freq_base": float(rope.get("rope_theta") or c.get("rope_theta", 10_000.0)),
        "expert_count": first("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
        "expert_used_count": first("num_experts_per_tok", "moe_topk", "moe_k"),
        "expert_group_count": c.get("n_group"),
        "expert_group_used_count": c.get("topk_group"),
        "vocab_size": c["vocab_size"],
    }
    if rope.get("rope_type") in ("linear", "yarn"):
        keys["rope.scaling.type"] = rope["rope_type"]
        keys["rope.scaling.factor"] = float(rope["factor"])
    if rope.get("rope_type") == "yarn":
        keys["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        keys["rope.scaling.yarn_beta_fast"] = float(rope["beta_fast"])
        keys["rope.scaling.yarn_beta_slow"] = float(rope["beta_slow"])
    if family in LATENT:
        n, r, v, rank = (c[k] for k in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank"))
        keys |= {
            "attention.q_lora_rank": c.get("q_lora_rank"), "attention.kv_lora_rank": rank,
            "attention.key_length": rank + r, "attention.value_length": rank, "attention.key_length_mla": n + r,
            "attention.value_length_mla": v, "rope.dimension_count": r,
        }  # fmt: skip
        if rope.get("mscale_all_dim"):
            keys["rope.scaling.yarn_log_multiplier"] = 0.1 * rope["mscale_all_dim"]
    elif c.get("head_dim"):
        keys |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if family in ("deepseek", *LATENT, "glm4_moe", "dots1"):
        keys |= {
            "leading_dense_block_count": c["first_k_dense_replace"], "expert_feed_forward_length": width,
            "expert_shared_count": c["n_shared_experts"],
            "expert_weights_scale": float(c.get("routed_scaling_factor", 1.0)),
        }  # fmt: skip
    if family in (*LATENT, "glm4_moe", "dots1") and c.get("norm_topk_prob"):
        keys["expert_weights_norm"] = True
    if family in ("deepseek_v3", "kimi_k2", "glm4_moe", "dots1", "minimax_m2"):
        keys["expert_gating_func"] = 2
    if family == "deepseek":
        keys["rope.dimension_count"] = head_dim
        keys["rope.scaling.type"] = "none"
    if family == "glm4_moe":
        keys["rope.dimension_count"] = int(head_dim * rope["partial_rotary_factor"])
    if family == "minimax_m2":
        keys |= {"rope.dimension_count": head_dim // 2, "expert_feed_forward_length": width}
    if family in ("qwen2_moe", "qwen3_moe"):
        keys["expert_feed_forward_length"] = width
    if family == "qwen2_moe":
        keys["expert_shared_feed_forward_length"] = c["shared_expert_intermediate_size"]
    if family == "gpt_oss":
        keys |= {"attention.sliding_window": c["sliding_window"], "expert_feed_forward_length": width}
    if family == "granitemoe":
        keys |= {
            "attention.scale": c["attention_multiplier"], "embedding_scale": c["embedding_multiplier"],
            "residual_scale": c["residual_multiplier"], "logit_scale": c["logits_scaling"],
        }  # fmt: skip
    if family == "ernie4_5_moe":
        keys |= {
            "interleave_moe_layer_step": 1, "leading_dense_block_count": c["moe_layer_start_index"],
            "expert_feed_forward_length": width, "expert_shared_count": c["moe_num_shared_experts"],
            "expert_shared_feed_forward_length": 20,
        }  # fmt: skip
    if family == "hunyuan_v1_moe":
        keys |= {
            "expert_feed_forward_length": c["intermediate_size"], "expert_shared_count": 1,
            "expert_shared_feed_forward_length": c["intermediate_size"],
        }  # fmt: skip
    if family == "grok-1":
        keys |= {
            "embedding_scale": c["embedding_multiplier_scale"], "logit_scale": c["output_multiplier_scale"],
            "attention.output_scale": c["attn_output_multiplier"], "attn_logit_softcapping": c["max_attn_value"],
            "router_logit_softcapping": 30.0,
        }  # fmt: skip
    return {key: value for key, value in keys.items() if value is not None}


def rope_freqs(c: dict[str, Any]) -> Tensor | None:
    """Llama 3.1's factors, as `generate_extra_tensors` makes them."""
    rope = c.get("rope_parameters") or {}
    if rope.get("rope_type") != "llama3":
        return None
    dim, context = c["head_dim"], rope["original_max_position_embeddings"]
    waves = 2 * torch.pi * rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = (context / waves - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    return torch.where(waves < context / high, 1.0, torch.where(waves > context / low, factor, between))


def write(
    path: Path, arch: str, keys: dict[str, Any], tensors: dict[str, Tensor], kind: str = "F32", **more: Any
) -> Path:
    """A GGUF file through the `gguf` package. Vectors and routers stay F32, as llama.cpp has them."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in {**{f"{arch}.{key}": value for key, value in keys.items()}, **more}.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, x in tensors.items():
        data = x.float().contiguous().numpy()
        wanted = gguf.GGMLQuantizationType[kind]
        whole = data.shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] == 0
        if kind == "F32" or data.ndim < 2 or "ffn_gate_inp" in name or not whole:
            writer.add_tensor(name, data)
        else:
            writer.add_tensor(name, np.asarray(gguf.quants.quantize(data, wanted)), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def to_gguf(directory: Path, path: Path, kind: str = "F32", **more: Any) -> Path:
    """Convert; `more` are further keys, by their whole names."""
    values = json.loads((directory / "config.json").read_text())
    tensors = tensors_of(directory, values)
    if (freqs := rope_freqs(values)) is not None:
        tensors["rope_freqs.weight"] = freqs
    return write(path, ARCH[values["model_type"]], keys_of(values), tensors, kind, **more)
