"""What the claims compute of each config; all else is called as a module (see `Coverage`)."""

from manyhands.config import AttentionConfig, ModelConfig, MoEConfig, RopeConfig
from manyhands.kernels.native.library import ACTIVATION_CODES
from manyhands.runtime.coverage import Coverage

ATTENTION = Coverage(
    {
        "kind": ("gqa",),
        "qk_norm": ("none", "head", "full", "head_after_rope"),
        "layer_types": (None, "full_attention", "sliding_attention"),
        **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim", "attention_bias", "output_bias")),
        **dict.fromkeys(("sliding_window", "sinks", "attn_logit_softcap", "attention_multiplier")),
        # these have no meaning with this kind
        **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")),
        "latent_norm_eps": None,
    },
    AttentionConfig,
)
LATENT = Coverage(
    {
        "kind": ("mla",),
        "layer_types": (None, "full_attention", "sliding_attention"),
        **dict.fromkeys(("num_attention_heads", "attention_bias", "output_bias", "sliding_window")),
        **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")),
        "latent_norm_eps": None,
        **dict.fromkeys(("num_key_value_heads", "head_dim")),  # these have no meaning with this kind
    },
    AttentionConfig,
)
ROPE = Coverage(
    {
        "rope_type": ("default", "linear", "yarn", "llama3"),
        **dict.fromkeys(("rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow")),
        **dict.fromkeys(("mscale", "mscale_all_dim", "attention_factor", "truncate", "low_freq_factor")),
        **dict.fromkeys(("high_freq_factor", "partial_rotary_factor", "interleave")),
    },
    RopeConfig,
)
MIXTURE = Coverage(
    {
        "hidden_act": tuple(ACTIVATION_CODES),
        **dict.fromkeys(("router", "moe_intermediate_size", "expert_bias", "n_shared_experts")),
        **dict.fromkeys(("shared_expert_intermediate_size", "shared_expert_gate", "first_k_dense_replace")),
        **dict.fromkeys(("decoder_sparse_step", "mlp_only_layers")),
        "input_jitter": None,  # it acts in training only, where the router has no claim
    },
    MoEConfig,
)
MODEL = Coverage(
    {
        "hidden_act": tuple(ACTIVATION_CODES),
        **dict.fromkeys(("attention", "rope", "moe")),  # which have their own
        **dict.fromkeys(("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "rms_norm_eps")),
        **dict.fromkeys(("max_position_embeddings", "initializer_range", "tie_word_embeddings", "output_norms")),
        **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "output_multiplier")),
        "norm": ("rms_norm", "layer_norm"),  # which has no claim and is called as a module
        "lm_head_bias": None,
    },
    ModelConfig,
)
