"""References that transformers does not make by itself: composed of its parts, or its models in files as published.

What it has no class for (`deepseek`, `kimi_k2`) is built of one that computes the same; quantised files are compared
with the same class holding what they decode to; Grok-1 has its own oracle in `grok.py`.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .grok import grok_logits
from .quantizers import FP8, INT4, MXFP4, fp8, int4, mxfp4
from .references import (
    BASE,
    CASES,
    GROUPS,
    MLA,
    PLAIN,
    ROUTED,
    YARN,
    Chosen,
    L,
    Reference,
    V,
    lm_loss,
    make,
    positions,
    quiet,
    randomise,
    reference,
    runner,
)

K2: dict[str, Any] = MLA | ROUTED | {
    "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.8, "norm_topk_prob": True, "n_shared_experts": 1,
    "rope_parameters": YARN | {"rope_theta": 50000.0, "beta_fast": 1.0, "mscale_all_dim": 1.0},
}  # fmt: skip
PUBLISHED: dict[str, Any] = {
    "aux_loss_alpha": 0.001, "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "ep_size": 1,
    "attention_dropout": 0.0, "attention_bias": False, "hidden_act": "silu", "initializer_range": 0.02,
    "moe_layer_freq": 1, "num_nextn_predict_layers": 0, "pretraining_tp": 1, "scoring_func": "sigmoid",
    "seq_aux": True, "topk_method": "noaux_tc", "use_cache": True, "transformers_version": "4.48.3",
}  # fmt: skip
"""What the published files of DeepSeek-V3's line say besides."""


def published(fields: dict[str, Any], model_type: str, dtype: str = "float32", **more: Any) -> dict[str, Any]:
    """A `config.json` in the style of transformers 4."""
    values = {k: v for k, v in fields.items() if k not in ("rope_parameters", "attn_implementation")}
    rope = dict(fields["rope_parameters"])
    values["rope_theta"], kind = rope.pop("rope_theta"), rope.pop("rope_type")
    values["rope_scaling"] = None if kind == "default" else rope | {"type": kind}
    architecture = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": model_type, "torch_dtype": dtype}
    return PUBLISHED | architecture | values | more


def store(directory: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Write a checkpoint."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file({n: t.detach().contiguous().clone() for n, t in tensors.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))


def unstacked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The experts one by one, as in files."""
    found: dict[str, Tensor] = {}
    for name, t in tensors.items():
        stem, _, leaf = name.rpartition(".")
        if not stem.endswith(".experts"):
            found[name] = t
            continue
        for e, one in enumerate(t):
            parts = (
                {"down_proj": one}
                if leaf == "down_proj"
                else dict(zip(("gate_proj", "up_proj"), one.chunk(2), strict=True))
            )
            found |= {f"{stem}.{e}.{projection}.weight": part for projection, part in parts.items()}
    return found


def hand_written(
    model: Any, directory: Path, reload: Any, names: Callable[[str], str] = str, allowed: str = "-"
) -> Reference:
    """The comparisons of a model whose files were written here. `names`: a name in the model -> that in the file;
    `allowed`: how names begin that `reload`, a class, does not expect."""

    def gradients(ids_BS: Tensor, mask_BS: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        out = model(input_ids=ids_BS, attention_mask=mask_BS, position_ids=positions(mask_BS), use_cache=False)
        lm_loss(out.logits, ids_BS, mask_BS).backward()
        found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
        return {names(n): g for n, g in unstacked(found).items()}

    def load(path: Path) -> Callable[[Tensor, Tensor], tuple[Tensor, Chosen]]:
        values = json.loads((path / "config.json").read_text())
        if values["model_type"] == "kimi_k2":  # which transformers reads as deepseek_v3 only inside Kimi K2.5
            values["model_type"] = "deepseek_v3"
        config = reload.config_class.from_dict(values)
        again, info = reload.from_pretrained(
            path, config=config, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
        )
        info["unexpected_keys"] = [n for n in info["unexpected_keys"] if not n.startswith(allowed)]
        assert not any(info.values()), info
        return runner(again.eval())

    made = reference(model, directory)
    return replace(made, gradients=gradients, router_loss=None, reload=None if reload is None else load)


def deepseek(directory: Path, hostile: bool) -> Reference:
    """Llama with DeepSeek-V2's greedy sparse blocks after the first layer."""
    from transformers import DeepseekV2Config, LlamaConfig, LlamaForCausalLM
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

    shared = BASE | {"num_key_value_heads": 2, "intermediate_size": 40, "rope_parameters": PLAIN}
    model: Any = LlamaForCausalLM(LlamaConfig(**shared))
    sparse = DeepseekV2Config(**(BASE | ROUTED | {"topk_method": "greedy", "routed_scaling_factor": 1.0}))
    sparse._experts_implementation = "eager"
    for layer in model.model.layers[ROUTED["first_k_dense_replace"] :]:
        layer.mlp = DeepseekV2Moe(sparse)
    model = model.float().eval()
    randomise(model, hostile)
    own = {"architectures": ["DeepseekForCausalLM"], "scoring_func": "softmax", "norm_topk_prob": False}
    config = published(shared | ROUTED, "deepseek", **own)
    for name in ("topk_method", "num_nextn_predict_layers", "ep_size"):
        config.pop(name)
    store(directory, unstacked(model.state_dict()), config)
    return hand_written(model, directory, None)


def _v3(fields: dict[str, Any], hostile: bool) -> Any:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    model = DeepseekV3ForCausalLM(DeepseekV3Config(**(fields | {"num_mtp_layers": 0}))).float().eval()
    randomise(model, hostile)
    return model


def kimi_k2(directory: Path, hostile: bool) -> Reference:
    """DeepSeek-V3's class under another name."""
    model = _v3(K2, hostile)
    store(directory, unstacked(model.state_dict()), published(K2, "kimi_k2"))
    return hand_written(model, directory, type(model))


def mtp_tensors(like: dict[str, Tensor]) -> dict[str, Tensor]:
    """A multi-token-prediction module as DeepSeek stores it: one more layer, and what joins it to the model."""
    g = torch.Generator().manual_seed(7)
    last = {n.replace(f"layers.{L - 1}.", f"layers.{L}."): t for n, t in like.items() if f"layers.{L - 1}." in n}
    width, stem = like["model.norm.weight"].shape[0], f"model.layers.{L}."
    shapes = {
        "embed_tokens.weight": (V, width), "enorm.weight": (width,), "hnorm.weight": (width,),
        "eh_proj.weight": (width, 2 * width), "shared_head.norm.weight": (width,),
        "shared_head.head.weight": (V, width),
    }  # fmt: skip
    shapes = {stem + n: s for n, s in shapes.items()} | {n: tuple(t.shape) for n, t in last.items()}
    return {n: torch.randn(s, generator=g) for n, s in shapes.items()}


def deepseek_v3_mtp(directory: Path, hostile: bool) -> Reference:
    """With a multi-token-prediction module, which neither model computes with."""
    fields = MLA | ROUTED | GROUPS
    model = _v3(fields, hostile)
    tensors = unstacked(model.state_dict())
    store(directory, tensors | mtp_tensors(tensors), published(fields, "deepseek_v3", num_nextn_predict_layers=1))
    return hand_written(model, directory, type(model), allowed=f"model.layers.{L}.")


Quantizer = Callable[[str, Tensor], tuple[dict[str, Tensor], Tensor]]


@torch.no_grad()
def quantized(
    directory: Path,
    tensors: dict[str, Tensor],
    config: dict[str, Any],
    quantize: Quantizer,
    which: Callable[[str], bool],
) -> tuple[dict[str, Tensor], Path]:
    """Store the tensors that `which` names quantised and the others in bfloat16.

    Returns what they all decode to, and a directory of the same in bfloat16.
    """
    stored, exact = {}, {}
    for name, t in tensors.items():
        if name.endswith("e_score_correction_bias"):
            stored[name] = exact[name] = t
        elif which(name):
            parts, exact[name] = quantize(name, t)
            stored |= parts
        else:
            stored[name] = t.to(torch.bfloat16)
            exact[name] = stored[name].float()
    store(directory, stored, config)
    plain = directory.with_name(directory.name + "-decoded")
    bias = {n: t for n, t in exact.items() if n.endswith("e_score_correction_bias")}
    config = {k: v for k, v in config.items() if k != "quantization_config"}
    if "text_config" in config:
        config["text_config"] = {k: v for k, v in config["text_config"].items() if k != "quantization_config"}
    store(plain, {n: t.to(torch.bfloat16) for n, t in exact.items()} | bias, config)
    return exact, plain


@torch.no_grad()
def fill(model: Any, tensors: dict[str, Tensor], names: Callable[[str], str] = str) -> None:
    """Put tensors, by the file's names, into a model."""
    for name, t in unstacked(model.state_dict()).items():  # views of the model's own
        t.copy_(tensors[names(name)])


def _is_fp8(name: str) -> bool:
    return name.endswith("_proj.weight") or "kv_a_proj_with_mqa" in name


def deepseek_v3_fp8(directory: Path, hostile: bool) -> Reference:
    """FP8 in blocks of 128 × 128, several and ragged, the MTP module's too."""
    wide = {"hidden_size": 136, "moe_intermediate_size": 132, "intermediate_size": 140}
    fields = MLA | ROUTED | GROUPS | wide
    model = _v3(fields, hostile)
    tensors = unstacked(model.state_dict())
    config = published(fields, "deepseek_v3", "bfloat16", num_nextn_predict_layers=1, quantization_config=FP8)
    # the projection that joins the module to the model is not quantised
    exact, plain = quantized(
        directory, tensors | mtp_tensors(tensors), config, fp8, lambda n: _is_fp8(n) and "eh_proj" not in n
    )
    fill(model, exact)
    return replace(hand_written(model, directory, type(model), allowed=f"model.layers.{L}."), unquantised=plain)


def gpt_oss_mxfp4(directory: Path, hostile: bool) -> Reference:
    """Experts in MXFP4."""
    from transformers import GptOssConfig, GptOssForCausalLM

    fields = CASES["gpt_oss"][1] | {"intermediate_size": 64, "hidden_size": 64}
    model: Any = GptOssForCausalLM(GptOssConfig(**fields)).float().eval()
    randomise(model, hostile)
    config = published(fields, "gpt_oss", "bfloat16", quantization_config=MXFP4, swiglu_limit=7.0)
    config = {k: v for k, v in config.items() if k not in PUBLISHED} | {"architectures": ["GptOssForCausalLM"]}
    exact, plain = quantized(
        directory,
        model.state_dict(),
        config,
        mxfp4,
        lambda n: n.endswith(("experts.gate_up_proj", "experts.down_proj")),
    )
    model.load_state_dict(exact)
    made = hand_written(model, directory, GptOssForCausalLM)
    theirs = reference(model, directory)
    return replace(made, gradients=theirs.gradients, router_loss=theirs.router_loss, unquantised=plain)


def _k25_name(name: str) -> str:
    """transformers' name for a tensor of Kimi K2.5 -> the published one."""
    if name == "lm_head.weight":
        return "language_model.lm_head.weight"
    return name.replace("model.language_model.", "language_model.model.")


def _k25(directory: Path, hostile: bool, packed: bool) -> Reference:
    from safetensors.torch import load_file
    from transformers import Kimi_K25Config, Kimi_K25ForConditionalGeneration

    text = K2 | ({"moe_intermediate_size": 64, "hidden_size": 64} if packed else {})
    vision = {
        "hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 28,
        "pos_emb_height": 4, "pos_emb_width": 4,
    }  # fmt: skip
    top: dict[str, Any] = {"tie_word_embeddings": False, "vision_config": vision, "projection_hidden_size": 24}
    model: Any = Kimi_K25ForConditionalGeneration(
        Kimi_K25Config(text_config=text | {"model_type": "deepseek_v3", "num_mtp_layers": 0}, **top)
    )
    model = model.float().eval()
    model.set_attn_implementation("eager")
    randomise(model, hostile)
    model.save_pretrained(directory / "theirs")  # for the vision tower: its names differ from the model's
    tower = load_file(directory / "theirs" / "model.safetensors")
    tower = {n.removeprefix("model."): t for n, t in tower.items() if "mm_projector" in n or "vision_tower" in n}
    tensors = {_k25_name(n): t for n, t in unstacked(model.state_dict()).items() if not n.startswith("model.vis")}
    tensors = {n: t for n, t in tensors.items() if n.startswith("language_model.")}
    config = {
        "architectures": ["KimiK25ForConditionalGeneration"], "model_type": "kimi_k25", "torch_dtype": "float32",
        "media_placeholder_token_id": 163605, "text_config": published(text, "kimi_k2"), **top,
    }  # fmt: skip
    if packed:
        config["text_config"]["quantization_config"] = INT4
        exact, plain = quantized(directory, tensors | tower, config, int4, lambda n: ".mlp.experts." in n)
        fill_text = {n: exact[n] for n in tensors}
        language = {n: t for n, t in model.state_dict().items() if n == "lm_head.weight" or "language_model" in n}
        with torch.no_grad():
            for name, t in unstacked(language).items():
                t.copy_(fill_text[_k25_name(name)])
        return replace(hand_written(model, directory, type(model), _k25_name), unquantised=plain)
    store(directory, tensors | tower, config)
    return hand_written(model, directory, type(model), _k25_name)


def kimi_k25(directory: Path, hostile: bool) -> Reference:
    """The language model of a whole Kimi K2.5; the vision tower is kept."""
    return _k25(directory, hostile, packed=False)


def kimi_k25_int4(directory: Path, hostile: bool) -> Reference:
    """The same with its experts packed in INT4."""
    return _k25(directory, hostile, packed=True)


def llama4(directory: Path, hostile: bool) -> Reference:
    """The language model of a whole Llama 4; the vision tower is kept."""
    from transformers import Llama4Config, Llama4ForConditionalGeneration

    vision = {
        "hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 28,
        "image_size": 8, "patch_size": 4, "vision_output_dim": 24, "projector_input_dim": 24,
        "projector_output_dim": 24,
    }  # fmt: skip
    text = CASES["llama4_text"][1] | {"interleave_moe_layer_step": 2, "use_qk_norm": False}
    model: Any = Llama4ForConditionalGeneration(Llama4Config(text_config=text, vision_config=vision)).float().eval()
    model.set_attn_implementation("eager")
    randomise(model, hostile)
    model.save_pretrained(directory)
    return reference(model, directory)


GROK: dict[str, Any] = {
    "architectures": ["Grok1ModelForCausalLM"], "model_type": "grok-1", "vocab_size": V, "hidden_size": 48,
    "intermediate_size": 40, "num_hidden_layers": L, "num_attention_heads": 6, "num_key_value_heads": 2,
    "attn_output_multiplier": 0.9, "max_attn_value": 30.0, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "embedding_multiplier_scale": 6.9, "output_multiplier_scale": 0.58, "num_experts": 8, "num_experts_per_tok": 2,
    "output_router_logits": False, "router_aux_loss_coef": 0.001, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "torch_dtype": "float32", "transformers_version": "4.35.0", "use_cache": True,
}  # fmt: skip
"""In the fields of the port; that the embedding is also the head is its default, which its files leave out."""


def grok_tensors(hostile: bool) -> dict[str, Tensor]:
    """Random weights by the names of the file. `hostile` as in `randomise`; attention logits reach the cap."""
    width, inner, E = GROK["hidden_size"], GROK["intermediate_size"], GROK["num_experts"]
    kv = width // GROK["num_attention_heads"] * GROK["num_key_value_heads"]
    layer: dict[str, tuple[int, ...]] = {f"attn.{n}_proj.weight": (kv if n in "kv" else width, width) for n in "qkvo"}
    layer |= {f"{n}_norm.scale": (width,) for n in ("pre_attn", "post_attn", "pre_moe", "post_moe")}
    layer["moe_block.gate.weight"] = (E, width)
    for e in range(E):
        layer |= {f"moe_block.experts.{e}.{n}.weight": (inner, width) for n in ("linear", "linear_v")}
        layer[f"moe_block.experts.{e}.linear_1.weight"] = (width, inner)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, width), "model.norm.scale": (width,)}
    shapes |= {f"model.layers.{i}.{n}": shape for i in range(L) for n, shape in layer.items()}
    g, tensors = torch.Generator().manual_seed(3), {}
    for name, shape in shapes.items():
        t = torch.rand(shape, generator=g) + 0.5 if name.endswith("scale") else torch.randn(shape, generator=g)
        tensors[name] = t if len(shape) == 1 else t * 0.2 if "embed" in name else t * 1.3 * shape[-1] ** -0.5
    if hostile:
        for name, t in tensors.items():
            if name.endswith("gate.weight"):
                t.mul_(4.0)
                t[1] = t[0]
            elif ".experts.1." in name:
                t.copy_(tensors[name.replace(".experts.1.", ".experts.0.")])
            elif "attn.q_proj" in name:
                t.mul_(8.0)
    return tensors


def grok_1(directory: Path, hostile: bool) -> Reference:
    """The oracle of `grok.py`; its decoding is the whole again."""
    tensors = grok_tensors(hostile)
    store(directory, tensors, GROK)
    weights = {n: t.double().requires_grad_() for n, t in tensors.items()}

    def run(ids_BS: Tensor, mask_BS: Tensor) -> tuple[Tensor, Chosen]:
        with torch.no_grad():
            return grok_logits(weights, GROK, ids_BS, mask_BS)

    def gradients(ids_BS: Tensor, mask_BS: Tensor) -> dict[str, Tensor]:
        loss = lm_loss(grok_logits(weights, GROK, ids_BS, mask_BS)[0], ids_BS, mask_BS)
        return dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))

    return Reference(directory, run, None, gradients, None, None)


OTHERS: dict[str, Callable[[Path, bool], Reference]] = {
    "deepseek": deepseek,
    "deepseek_v3, MTP": deepseek_v3_mtp,
    "deepseek_v3, FP8, MTP": deepseek_v3_fp8,
    "kimi_k2": kimi_k2,
    "kimi_k25": kimi_k25,
    "kimi_k25, INT4": kimi_k25_int4,
    "gpt_oss, MXFP4": gpt_oss_mxfp4,
    "llama4": llama4,
    "grok-1": grok_1,
}
"""Case -> its maker (directory, hostile). The case begins with the `model_type`."""

ALL = [*CASES, *OTHERS]


def make_any(case: str, directory: Path, hostile: bool = False) -> Reference:
    """The reference of a case of either kind."""
    quiet()
    return OTHERS[case](directory, hostile) if case in OTHERS else make(case, directory, hostile)
