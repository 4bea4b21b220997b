"""Our tensor names and GGUF's, both ways: nearly the same for every architecture.

    layers.3.mlp.experts.down_proj     blk.3.ffn_down_exps.weight [E,D,F]
    layers.3.mlp.experts.gate_up_proj  blk.3.ffn_gate_exps.weight and blk.3.ffn_up_exps.weight [E,F,D]

Some tensors are not stored as they are meant (`checkpoint/gguf/logical.py`): rows of queries and keys in another order,
the key half of MLA's `kv_b` transposed, experts one by one. Their names here are those of what they mean.

E experts, D model width, F expert width. Source: `gguf/constants.py` and `tensor_mapping.py` of llama.cpp.
"""

from collections.abc import Iterator

from manyhands.config import ModelConfig
from manyhands.config.shapes import tensor_shapes
from manyhands.families.base import Piece
from manyhands.families.gguf.archs import Arch

TOP = {
    "embed_tokens.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
STEMS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "post_attention_layernorm": "ffn_norm",
    "attention_output_norm": "attn_output_norm",
    "mlp_output_norm": "layer_output_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.router": "ffn_gate_inp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
}
"""Our name in a layer without its ending (`.weight`, `.bias`), and GGUF's."""
WHOLE = {
    "self_attn.sinks": "attn_sinks.weight",
    "mlp.router.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.experts.up_proj": "ffn_up_exps.weight",
    "mlp.experts.up_proj_bias": "ffn_up_exps.bias",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
    "mlp.experts.down_proj_bias": "ffn_down_exps.bias",
}
_GATE_UP = {"mlp.experts.gate_up_proj": "weight", "mlp.experts.gate_up_proj_bias": "bias"}


def gguf_name(ours: str, arch: Arch) -> str | None:
    """GGUF's name of one of our tensors; None for one that it has no single tensor for, or none at all."""
    if not ours.startswith("layers."):
        return TOP.get(ours)
    layer, tail = ours.split(".", 2)[1:]
    if tail in WHOLE:
        return f"blk.{layer}.{WHOLE[tail]}"
    stem, _, ending = tail.rpartition(".")
    theirs = arch.renamed.get(stem) or STEMS.get(stem)
    return None if theirs is None else f"blk.{layer}.{theirs}.{ending}"


def pieces(config: ModelConfig, arch: Arch) -> Iterator[Piece]:
    """Every tensor of `config` in the order of the model, with its place in GGUF.

    A tensor that GGUF has no name for is named as ours is, so that whoever looks for it names it.
    """
    for ours in tensor_shapes(config):
        tail = ours.split(".", 2)[-1] if ours.startswith("layers.") else ours
        if tail in _GATE_UP:
            assert config.moe is not None
            width, block = config.moe.moe_intermediate_size, f"blk.{ours.split('.')[1]}"
            for n, half in enumerate(("gate", "up")):
                rows = slice(n * width, (n + 1) * width)
                yield Piece(ours, f"{block}.ffn_{half}_exps.{_GATE_UP[tail]}", (slice(None), rows))
        elif tail == "mlp.shared_expert_gate.weight":  # [1,D] here, [D] there
            yield Piece(ours, gguf_name(ours, arch) or ours, (0,))
        else:
            yield Piece(ours, gguf_name(ours, arch) or ours)
