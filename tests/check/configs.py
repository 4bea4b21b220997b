"""Small models of the published kinds."""

from manyhands.config import AttentionConfig, BalanceConfig, ModelConfig, MoEConfig, RouterConfig

MIXTRAL = ModelConfig(
    num_hidden_layers=2,
    attention=AttentionConfig(num_attention_heads=8, num_key_value_heads=2, qk_norm="head", sliding_window=6),
    moe=MoEConfig(),
    tie_word_embeddings=True,
)
MOONLIGHT = ModelConfig(
    num_hidden_layers=4,
    moe=MoEConfig(
        first_k_dense_replace=1,
        n_shared_experts=1,
        router=RouterConfig(
            num_experts=12, num_experts_per_tok=3, score="sigmoid", bias=True, routed_scaling_factor=2.446
        ),
    ),
)
DEEPSEEK = ModelConfig(
    vocab_size=129_280,
    hidden_size=7168,
    num_hidden_layers=61,
    intermediate_size=18_432,
    attention=AttentionConfig(kind="mla", num_attention_heads=128, q_lora_rank=1536),
    moe=MoEConfig(
        moe_intermediate_size=2048,
        first_k_dense_replace=3,
        n_shared_experts=1,
        router=RouterConfig(
            num_experts=256,
            num_experts_per_tok=8,
            score="sigmoid",
            bias=True,
            routed_scaling_factor=2.5,
            n_group=8,
            topk_group=4,
        ),
    ),
)
BALANCE = BalanceConfig(z_loss_coef=1e-3, sequence_loss_coef=1e-3)
