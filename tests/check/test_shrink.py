"""A shrunk model keeps every mechanism."""

from manyhands.check import shrink
from manyhands.config import AttentionConfig, ModelConfig, MoEConfig, RouterConfig
from tests.check.configs import DEEPSEEK


def test_deepseek_v3():
    small = shrink(DEEPSEEK)
    assert (small.hidden_size, small.vocab_size, small.num_hidden_layers) == (64, 128, 3)
    assert small.sparse_layers == [1, 2]  # one dense layer stays
    r = small.moe.router
    assert (r.num_experts, r.n_group, r.topk_group, r.num_experts_per_tok) == (16, 4, 2, 4)
    assert (r.score, r.bias, r.routed_scaling_factor) == ("sigmoid", True, 2.5)
    assert small.attention.kind == "mla" and small.attention.q_lora_rank == 32
    assert small.moe.n_shared_experts == 1
    assert shrink(small) == small


def test_grouped_heads_and_pattern():
    big = ModelConfig(
        num_hidden_layers=24,
        attention=AttentionConfig(num_attention_heads=64, num_key_value_heads=8, sliding_window=4096),
        moe=MoEConfig(decoder_sparse_step=2, router=RouterConfig(num_experts=60, num_experts_per_tok=60)),
    )
    small = shrink(big)
    assert small.attention.num_attention_heads == 4 * small.attention.kv_heads
    assert small.attention.sliding_window == 8
    assert small.sparse_layers == [1, 3]
    assert small.moe.router.num_experts_per_tok == small.moe.router.num_experts == 16


def test_small_stays():
    tiny = ModelConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=64,
        attention=AttentionConfig(head_dim=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8),
        moe=MoEConfig(moe_intermediate_size=16),
    )
    assert shrink(tiny) == tiny


def test_what_is_said_of_each_layer_is_shortened_with_them():
    config = ModelConfig(
        num_hidden_layers=8,
        attention=AttentionConfig(sliding_window=128, layer_types=["sliding_attention", "full_attention"] * 4),
        moe=MoEConfig(
            mlp_only_layers=[0, 5], n_shared_experts=1, shared_expert_intermediate_size=5632, shared_expert_gate=True
        ),
    )
    small = shrink(config)
    assert small.num_hidden_layers == 3 and small.sparse_layers == [1, 2] and small.dense_layers == [0]
    assert small.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    assert small.attention.sliding_window == 8 and small.moe.shared_width == 48


def test_one_layer_of_each_kind_of_attention_stays():
    a = AttentionConfig(
        layer_types=(["chunked_attention"] * 3 + ["full_attention"]) * 4, attention_chunk_size=8192, floor_scale=8192,
        nope_layers=[3, 7, 11, 15],
    )  # fmt: skip
    for moe in (MoEConfig(), None):
        small = shrink(ModelConfig(num_hidden_layers=16, attention=a, moe=moe))
        assert small.layer_types == ["chunked_attention"] * 3 + ["full_attention"]
        assert small.attention.nope_layers == (3,) and small.attention.attention_chunk_size == 8
        assert small.attention.floor_scale == 8 and shrink(small) == small
    far = AttentionConfig(sliding_window=9, layer_types=["full_attention"] * 12 + ["sliding_attention"] * 4)
    assert shrink(ModelConfig(num_hidden_layers=16, attention=far)).num_hidden_layers == 2, "one far off is not reached"
