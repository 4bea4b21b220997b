"""Families nobody here knows: every field that can change a count is understood, refused, or named.

Counts are held against models that transformers builds, and against sums by hand.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from manyhands.errors import ConfigError
from manyhands.plan import count_model
from manyhands.plan.guess import guess_config
from manyhands.plan.subject import read_subject

MOE: dict[str, Any] = {
    "model_type": "new",
    "vocab_size": 1000,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "hidden_act": "silu",
}


def plan(tmp_path: Path, fields: dict[str, Any]) -> Any:
    (tmp_path / "config.json").write_text(json.dumps(fields))
    return read_subject(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "sparse"),
    [
        ({"moe_layer_freq": [0, 1, 1, 1]}, [1, 2, 3]),
        ({"moe_layer_freq": 2}, [0, 2]),
        ({"mlp_layer_types": ["dense", "sparse", "dense", "sparse"]}, [1, 3]),
        ({"moe_layers_enum": "1,2,3"}, [1, 2, 3]),
        ({"moe_layers": [0, 3]}, [0, 3]),
        ({"mlp_only_layers": [2]}, [0, 1, 3]),
        ({"first_k_dense_replace": 1}, [1, 2, 3]),
        ({"num_dense_layers": 3}, [3]),
        ({"decoder_sparse_step": 2}, [1, 3]),
        ({"interleave_moe_layer_step": 2}, [1, 3]),
        ({"moe_layer_start_index": 1, "moe_layer_end_index": 2}, [1, 2]),
        ({"first_k_dense_replace": 1, "moe_layer_freq": 2}, [2]),
        ({"moe_layers": [1, 2], "mlp_layer_types": ["dense", "sparse", "sparse", "dense"]}, [1, 2]),
    ],
)
def test_sparse_layers_are_those_that_the_file_says(tmp_path: Path, change: dict[str, Any], sparse: list[int]) -> None:
    subject = plan(tmp_path, MOE | change)
    assert subject.config.sparse_layers == sparse
    assert subject.counts.by_component["routed experts"] == len(sparse) * 8 * 3 * 64 * 32
    assert all(name in subject.notes[1] for name in change), "and the notes say which field was taken"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"moe_layer_freq": [0, 1, 1]}, "moe_layer_freq"),
        ({"moe_layer_freq": [0, 1, 2, 1]}, "moe_layer_freq"),
        ({"mlp_layer_types": ["dense", "sparse", "gru", "sparse"]}, "mlp_layer_types"),
        ({"moe_layers_enum": "1,2,9"}, "moe_layers_enum"),
        ({"decoder_sparse_step": "2"}, "decoder_sparse_step"),
        ({"zero_expert_num": 4}, "zero_expert_num"),
        ({"attn_type_list": [0, 1, 0, 1]}, "attn_type_list"),
        ({"layers_block_type": ["mamba", "attention", "mamba", "attention"]}, "layers_block_type"),
        ({"hybrid_override_pattern": "M-M*"}, "hybrid_override_pattern"),
        ({"layer_types": ["linear_attention"] * 4}, "layer_types"),
        ({"full_attention_interval": 4}, "full_attention_interval"),
        ({"expert_bottleneck_size": 4}, "expert_bottleneck_size"),
        ({"intermediate_size_mlp": 512}, "intermediate_size_mlp"),
        ({"v_head_dim": 16}, "v_head_dim"),
        ({"num_query_groups": 4}, "num_query_groups"),
        ({"swa_num_key_value_heads": 4}, "swa_num_key_value_heads"),
        ({"hidden_act": "relu2"}, "hidden_act"),
        ({"model_type": "jetmoe"}, "experts in its attention"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        plan(tmp_path, MOE | change)
    assert "\n" not in str(error.value)


def test_experts_of_their_own_width(tmp_path: Path) -> None:
    fields = {
        "model_type": "new",
        "vocab_size": 1000,
        "hidden_size": 64,
        "num_layers": 2,
        "num_attention_heads": 2,
        "ffn_hidden_size": 256,
        "expert_ffn_hidden_size": 32,
        "n_routed_experts": 8,
        "moe_topk": 2,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    }
    assert plan(tmp_path, fields).counts.by_component["routed experts"] == 8 * 2 * 3 * 64 * 32
    with pytest.raises(ConfigError, match="zero_expert_num"):
        plan(tmp_path, fields | {"zero_expert_num": 4})


def test_windows_by_layer(tmp_path: Path) -> None:
    for change, growing in (
        ({"hybrid_layer_pattern": [0, 1, 1, 1]}, 1),
        ({"sliding_window_pattern": 2}, 2),
        ({"sliding_window_pattern": "LLLG"}, 1),
        ({"use_sliding_window": True, "max_window_layers": 3}, 3),
        ({"use_sliding_window": False}, 4),
        ({"layer_types": ["full_attention"] * 3 + ["sliding_attention"]}, 3),
        ({}, 0),
    ):
        sizes = plan(tmp_path, MOE | {"sliding_window": 128} | change).sizes
        assert sizes.windows.count(None) == growing, change


def test_groups_are_key_value_heads(tmp_path: Path) -> None:
    fields = {k: v for k, v in MOE.items() if k != "num_key_value_heads"}
    for name in ("num_attention_groups", "num_query_groups", "multi_query_group_num"):
        assert plan(tmp_path, fields | {name: 2}).config.attention.kv_heads == 2


def test_whatever_was_not_looked_at_is_named(tmp_path: Path) -> None:
    odd = {"a_list": [1, 2], "a_word": "yes", "an_object": {"x": 1}, "a_number": 3, "a_flag": True}
    assert all(name in " ".join(plan(tmp_path, MOE | odd).notes) for name in odd)


SMALL = {"num_hidden_layers": 4, "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}
BUILT: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 32, "decoder_sparse_step": 2},
    "qwen2_moe": {"num_experts": 8, "moe_intermediate_size": 32, "mlp_only_layers": [1]},
    "glm4_moe": {"n_routed_experts": 8, "moe_intermediate_size": 32, "first_k_dense_replace": 2},
    "minimax_m2": {"num_local_experts": 8},
    "phimoe": {"num_local_experts": 4},
    "granitemoe": {"num_local_experts": 8},
    "olmo3": {},
    "smollm3": {},
    "cohere2": {},
}


@pytest.mark.parametrize("model_type", BUILT)
def test_counts_are_those_of_the_model_that_transformers_builds(model_type: str) -> None:
    """Every matrix counts; only norms and biases may differ."""
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(model_type, **SMALL | HEADS | BUILT[model_type])
    found, _ = guess_config(json.loads(config.to_json_string(use_diff=False)), model_type)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    weights = sum(p.numel() for name, p in model.named_parameters() if p.ndim > 1 and not name.endswith("bias"))
    counts = count_model(found)
    biases = 4 * 4 * 64 if found.attention.attention_bias else 0
    assert 0 <= counts.total - counts.by_component["norms"] - weights <= biases + 4 * 2 * 64
