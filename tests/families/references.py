"""Small random models of every family, made and run by the reference implementation: transformers itself.

Where transformers has no class (DeepSeekMoE-16B, Grok-1) the reference is composed in `other_references.py`.

B batch, S sequence, T = B·S, V vocabulary.
"""

import copy
import json
import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

V, D, L = 96, 32, 3
BASE: dict[str, Any] = {
    "vocab_size": V, "hidden_size": D, "num_hidden_layers": L, "num_attention_heads": 4,
    "max_position_embeddings": 64, "rms_norm_eps": 0.02, "tie_word_embeddings": False, "attn_implementation": "eager",
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
GQA: dict[str, Any] = BASE | {"num_key_value_heads": 2, "head_dim": 12}
PLAIN: dict[str, Any] = {"rope_type": "default", "rope_theta": 500.0}
YARN: dict[str, Any] = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 1024,
    "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.7,
}  # fmt: skip
"""As trained on 1024 positions, so that of eight frequencies some are kept, some interpolated and some between."""
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "original_max_position_embeddings": 32,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}  # fmt: skip
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope", "rope_theta": 500.0, "original_max_position_embeddings": 32, "short_mscale": 1.2,
    "long_mscale": 1.3, "short_factor": [1.0, 1.1, 1.3, 1.6], "long_factor": [1.5, 2.0, 3.5, 6.0],
}  # fmt: skip
"""The comparison's sequences are short: of long ones `test_phimoe.py` says more."""
MLA: dict[str, Any] = BASE | {
    "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 20, "qk_rope_head_dim": 16, "qk_nope_head_dim": 12,
    "v_head_dim": 10, "rope_parameters": YARN, "max_position_embeddings": 4096,
}  # fmt: skip
ROUTED: dict[str, Any] = {
    "intermediate_size": 40, "moe_intermediate_size": 16, "n_routed_experts": 8, "n_shared_experts": 2,
    "num_experts_per_tok": 3, "first_k_dense_replace": 1,
}  # fmt: skip
GROUPS: dict[str, Any] = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "norm_topk_prob": True}
LOCAL: dict[str, Any] = {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 16}
EXPERTS: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", GQA | LOCAL | {"sliding_window": 7, "rope_parameters": PLAIN}),
    "mixtral, one expert per token": ("Mixtral", GQA | LOCAL | {"num_experts_per_tok": 1, "rope_parameters": PLAIN}),
    "qwen2_moe": (
        "Qwen2Moe",
        BASE | EXPERTS | {
            "num_key_value_heads": 2, "intermediate_size": 40, "moe_intermediate_size": 16, "mlp_only_layers": [1],
            "shared_expert_intermediate_size": 28, "norm_topk_prob": False, "rope_parameters": PLAIN, "qkv_bias": True,
        },
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        GQA | EXPERTS | {
            "intermediate_size": 40, "moe_intermediate_size": 16, "norm_topk_prob": True, "decoder_sparse_step": 2,
            "rope_parameters": PLAIN, "attention_bias": True,
        },
    ),
    "olmoe": (
        "Olmoe",
        BASE | EXPERTS | {
            "num_key_value_heads": 2, "intermediate_size": 16, "norm_topk_prob": False,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        },
    ),
    "deepseek_v2": (
        "DeepseekV2",
        MLA | ROUTED | {
            "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5,
        },
    ),
    "deepseek_v2, greedy": ("DeepseekV2", MLA | ROUTED | {"q_lora_rank": None, "rope_parameters": PLAIN}),
    "deepseek_v3": ("DeepseekV3", MLA | ROUTED | GROUPS | {"num_mtp_layers": 0}),
    "deepseek_v3, full-rank queries": (
        "DeepseekV3", MLA | ROUTED | GROUPS | {"q_lora_rank": None, "num_mtp_layers": 0},
    ),
    "gpt_oss": (
        "GptOss",
        GQA | LOCAL | {
            "sliding_window": 7, "num_experts_per_tok": 3, "head_dim": 16, "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 1500.0, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0,
                "truncate": False, "original_max_position_embeddings": 1024,
            },
        },
    ),
    "llama": ("Llama", GQA | {"intermediate_size": 40, "rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "qwen3": (
        "Qwen3",
        GQA | {
            "intermediate_size": 40, "rope_parameters": PLAIN, "use_sliding_window": True, "sliding_window": 7,
            "max_window_layers": 1,
        },
    ),
    "glm4_moe": (
        "Glm4Moe",
        GQA | ROUTED | {
            "rope_parameters": PLAIN | {"partial_rotary_factor": 0.5}, "attention_bias": True, "use_qk_norm": True,
            "routed_scaling_factor": 1.7, "num_mtp_layers": 0, "n_group": 4, "topk_group": 2,
        },
    ),
    "dots1": (
        "Dots1",
        GQA | ROUTED | {
            "rope_parameters": PLAIN, "routed_scaling_factor": 2.5, "norm_topk_prob": True, "sliding_window": 7,
            "max_window_layers": 1, "n_group": 4, "topk_group": 2,
        },
    ),
    "granitemoe": (
        "GraniteMoe",
        BASE | LOCAL | {
            "num_key_value_heads": 2, "rope_parameters": PLAIN, "embedding_multiplier": 1.7, "logits_scaling": 3.0,
            "residual_multiplier": 0.4, "attention_multiplier": 0.21,
        },
    ),
    "ernie4_5_moe": (
        "Ernie4_5_Moe",
        GQA | {
            "rope_parameters": PLAIN, "intermediate_size": 40, "moe_intermediate_size": 16, "moe_num_experts": 8,
            "moe_k": 3, "moe_num_shared_experts": 2, "moe_layer_start_index": 1,
        },
    ),
    "minimax_m2": (
        "MiniMaxM2",
        GQA | LOCAL | {"rope_parameters": PLAIN | {"partial_rotary_factor": 0.5}},
    ),
    "llama4_text": (
        "Llama4Text",
        GQA | LOCAL | {
            "num_experts_per_tok": 1, "intermediate_size_mlp": 40, "no_rope_layer_interval": 2,
            "attention_chunk_size": 7,
            "rope_parameters": LLAMA3 | {"high_freq_factor": 1.0},
        },
    ),
    "phimoe": (
        "Phimoe",
        BASE | LOCAL | {
            "num_key_value_heads": 2, "attention_bias": True, "lm_head_bias": True, "router_jitter_noise": 0.3,
            "sliding_window": 7, "rope_parameters": LONGROPE,
        },
    ),
    "phimoe, plain rotation, no biases": (
        "Phimoe", BASE | LOCAL | {"num_key_value_heads": 4, "rope_parameters": PLAIN},
    ),
    "hunyuan_v1_moe": (
        "HunYuanMoEV1",
        GQA | {"rope_parameters": PLAIN, "intermediate_size": 16, "num_experts": 8, "moe_topk": 3},
    ),
}  # fmt: skip
"""Case -> (transformers' class prefix, its configuration). The case begins with the `model_type`."""

Chosen = dict[int, Tensor]
"""Layer -> expert ids [T, K]."""


@dataclass
class Reference:
    """One reference model and its checkpoint."""

    directory: Path
    run: Callable[[Tensor, Tensor], tuple[Tensor, Chosen]]
    """(ids [B,S], mask [B,S]) -> logits [B,S,V] and chosen experts."""
    decode: Callable[[Tensor, Tensor, int], Tensor] | None
    """The same, the tokens after `split` one by one on a cache."""
    gradients: Callable[[Tensor, Tensor], dict[str, Tensor]]
    """Gradients of the language-model loss, by the tensor names of the file."""
    router_loss: Callable[[Tensor, Tensor], float] | None
    reload: Callable[[Path], Callable[[Tensor, Tensor], tuple[Tensor, Chosen]]] | None
    """The reference's own loader on a directory, strict: nothing missing, nothing unexpected."""
    unquantised: Path | None = None
    """Where the files are quantised: the tensors they decode to, rounded to bfloat16."""


def positions(mask_BS: Tensor) -> Tensor:
    return (mask_BS.cumsum(1) - 1).clamp(min=0)


def lm_loss(logits_BSV: Tensor, ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """Mean cross entropy of the next token where both are real."""
    real = mask_BS[:, 1:].bool() & mask_BS[:, :-1].bool()
    return torch.nn.functional.cross_entropy(logits_BSV[:, :-1][real], ids_BS[:, 1:][real])


@torch.no_grad()
def randomise(model: torch.nn.Module, hostile: bool) -> None:
    """Weights at which everything matters: norms away from 1, biases away from 0, sinks, routers that disagree.

    `hostile`: large router logits (not so large that scores round to 0 or 1 and all tie), two experts that are the same
    and always tie, and values beyond gpt-oss's clamp.
    """
    g = torch.Generator().manual_seed(1)
    for name, t in model.state_dict().items():
        if not t.is_floating_point():
            continue
        if "norm" in name:
            t.uniform_(0.5, 1.5, generator=g)
        elif "correction_bias" in name:
            t.uniform_(-0.2, 0.2, generator=g)
        elif name.endswith(("bias", "sinks")):
            t.normal_(0.0, 0.5, generator=g)
        else:
            t.normal_(0.0, 0.5 if "embed" in name else 1.3 * t.shape[-1] ** -0.5, generator=g)
    if not hostile:
        return
    sigmoid = type(model).__name__.startswith(("DeepseekV3", "Dots1", "Glm4Moe", "Kimi", "Llama4", "MiniMaxM2"))
    for name, t in model.state_dict().items():
        if any(part in name for part in (".gate.weight", ".router.weight", ".router.layer.weight", ".wg.weight")):
            t.mul_(2.0 if sigmoid else 6.0)
            t[1] = t[0]
        elif "correction_bias" in name:
            t.view(-1)[1] = t.view(-1)[0]
        elif ".experts." in name or (name.endswith(".router.bias")):
            t[1] = t[0]
        if type(model).__name__.startswith("GptOss") and name.endswith("experts.gate_up_proj"):
            t.mul_(4.0)  # beyond its clamp of 7


def router_names(model: torch.nn.Module) -> dict[int, torch.nn.Module]:
    """Layer number -> the module that is called with (hidden, expert ids, weights)."""
    found = {}
    for name, module in model.named_modules():
        if name.endswith(".experts") and hasattr(module, "down_proj"):
            found[int(name.split("layers.")[1].split(".")[0])] = module
    return found


def llama4_routers(model: torch.nn.Module) -> dict[int, torch.nn.Module]:
    """Layer number -> router, of a Llama 4: its experts are not told who chose them."""
    named = model.named_modules()
    return {int(name.split("layers.")[1].split(".")[0]): m for name, m in named if type(m).__name__ == "Llama4Router"}


def runner(model: Any) -> Callable[[Tensor, Tensor], tuple[Tensor, Chosen]]:
    """A forward pass that also says which experts were chosen."""

    def run(ids_BS: Tensor, mask_BS: Tensor) -> tuple[Tensor, Chosen]:
        chosen: Chosen = {}
        handles = [
            module.register_forward_hook(
                lambda _m, _args, out, n=layer: chosen.__setitem__(n, out[0].argmax(-1, keepdim=True))
            )
            for layer, module in llama4_routers(model).items()
        ]
        handles += [
            experts.register_forward_pre_hook(
                lambda _m, args, kwargs, n=layer: chosen.__setitem__(
                    n, (args[1] if len(args) > 1 else kwargs.get("top_k_index", kwargs.get("router_indices"))).clone()
                ),
                with_kwargs=True,
            )
            for layer, experts in router_names(model).items()
            if not handles
        ]
        with torch.no_grad():
            out = model(input_ids=ids_BS, attention_mask=mask_BS, position_ids=positions(mask_BS), use_cache=False)
        for handle in handles:
            handle.remove()
        return out.logits, chosen

    return run


def quiet() -> None:
    import transformers

    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()


def make(case: str, directory: Path, hostile: bool = False, **changes: Any) -> Reference:
    """The reference of a case, saved in `directory`."""
    import transformers

    quiet()
    prefix, fields = CASES[case]
    config_class = getattr(transformers, f"{prefix}Config")
    model_class = getattr(transformers, f"{prefix.removesuffix('Text')}ForCausalLM")
    model = model_class(config_class(**(copy.deepcopy(fields) | changes))).float().eval()
    randomise(model, hostile)
    model.save_pretrained(directory)
    return reference(model, directory)


def reference(model: Any, directory: Path) -> Reference:
    """Everything a comparison needs, from a transformers model that is saved in `directory`."""

    def decode(ids_BS: Tensor, mask_BS: Tensor, split: int) -> Tensor:
        places = positions(mask_BS)
        with torch.no_grad():
            out = model(
                input_ids=ids_BS[:, :split], attention_mask=mask_BS[:, :split], position_ids=places[:, :split],
                use_cache=True,
            )  # fmt: skip
            steps = [out.logits]
            for i in range(split, ids_BS.shape[1]):
                out = model(
                    input_ids=ids_BS[:, i : i + 1], attention_mask=mask_BS[:, : i + 1],
                    position_ids=places[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True,
                )  # fmt: skip
                steps.append(out.logits)
        return torch.cat(steps, 1)

    def gradients(ids_BS: Tensor, mask_BS: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        out = model(input_ids=ids_BS, attention_mask=mask_BS, position_ids=positions(mask_BS), use_cache=False)
        lm_loss(out.logits, ids_BS, mask_BS).backward()
        holder = copy.deepcopy(model)
        for p, q in zip(model.parameters(), holder.parameters(), strict=True):
            q.data = torch.zeros_like(p) if p.grad is None else p.grad.clone()
        with tempfile.TemporaryDirectory() as folder:
            holder.save_pretrained(folder)  # so that the gradients have the names and the layout of the files
            return load_file(Path(folder) / "model.safetensors")

    def router_loss(ids_BS: Tensor, mask_BS: Tensor) -> float:
        with torch.no_grad():
            out = model(
                input_ids=ids_BS, attention_mask=mask_BS, position_ids=positions(mask_BS), output_router_logits=True,
                use_cache=False,
            )  # fmt: skip
        return float(out.aux_loss)

    def reload(path: Path) -> Callable[[Tensor, Tensor], tuple[Tensor, Chosen]]:
        again, info = type(model).from_pretrained(
            path, output_loading_info=True, attn_implementation="eager", dtype="auto"
        )
        assert not any(info.values()), info
        return runner(again.eval())

    return Reference(directory, runner(model), decode, gradients, router_loss, reload)


def edit_config(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a saved `config.json`."""
    path = directory / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(change(values) or values))
