"""Fields of a `config.json` that change nothing in what a model computes, so that nobody need know them."""

from typing import Any

BOOKKEEPING = frozenset(
    {
        "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_experts_implementation",
        "_name_or_path", "add_bos_token", "add_cross_attention", "architectures", "attn_implementation",
        "auto_map", "base_model_ep_plan", "base_model_name_or_path", "base_model_pp_plan", "base_model_tp_plan",
        "bf16", "bos_token_id", "chunk_size_feed_forward", "cls_token_id", "cross_attention_hidden_size",
        "decoder_start_token_id", "dtype", "eod_token_id", "eos_token_id", "ep_size", "experts_implementation",
        "finetuning_task", "fp16", "fp32", "gradient_checkpointing", "gradient_checkpointing_kwargs",
        "id2label", "is_decoder", "is_encoder_decoder", "is_llama_config", "keys_to_ignore_at_inference",
        "label2id", "license", "loss_type", "mask_token_id", "max_seq_len", "max_seq_length",
        "model_max_length", "model_name", "model_type", "name", "num_labels", "output_past",
        "output_router_logits", "pad_token_id", "prefix", "problem_type", "pruned_heads", "quantization_config",
        "return_dict", "sep_token_id", "summary_activation", "summary_first_dropout", "summary_proj_to_labels",
        "summary_type", "summary_use_proj", "task_specific_params", "tf_legacy_loss", "tie_encoder_decoder",
        "tokenizer_class", "tokenizer_model_max_length", "tokenizer_padding_side", "torch_dtype", "torchscript",
        "transformers.js_config", "transformers_version", "trust_remote_code", "unk_token_id", "use_bfloat16",
        "use_flash_attention", "use_flash_attention_2", "use_flash_attn", "use_return_dict"
    }
)  # fmt: skip
"""Where a model comes from, its tokenizer's ids, how a program holds it."""

GENERATION = frozenset(
    {
        "assistant_confidence_threshold", "assistant_early_exit", "assistant_ensemble_weight",
        "assistant_lookbehind", "bad_words_ids", "begin_suppress_tokens", "cache_config",
        "cache_implementation", "compile_config", "constraints", "continuous_batching_config",
        "disable_compile", "diversity_penalty", "do_sample", "dola_layers", "early_stopping",
        "encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "epsilon_cutoff", "eta_cutoff",
        "exponential_decay_length_penalty", "force_words_ids", "forced_bos_token_id", "forced_eos_token_id",
        "guidance_scale", "is_assistant", "length_penalty", "low_memory", "max_cache_len", "max_length",
        "max_matching_ngram_size", "max_new_tokens", "max_time", "min_length", "min_new_tokens", "min_p",
        "no_repeat_ngram_size", "num_assistant_tokens", "num_assistant_tokens_schedule", "num_beam_groups",
        "num_beams", "num_return_sequences", "output_attentions", "output_hidden_states", "output_logits",
        "output_scores", "penalty_alpha", "prefill_chunk_size", "prompt_lookup_num_tokens",
        "remove_invalid_values", "renormalize_logits", "repetition_penalty", "return_dict_in_generate",
        "sequence_bias", "speculation_type", "stop_strings", "suppress_tokens", "target_lookbehind",
        "temperature", "token_healing", "top_h", "top_k", "top_p", "typical_p", "use_cache", "use_mtp",
        "watermarking_config"
    }
)  # fmt: skip
"""Settings of transformers' `GenerationConfig`, which older files keep in `config.json`."""

TRAINING_ONLY = frozenset(
    {
        "activation_dropout", "attention_dropout", "attn_pdrop", "aux_loss_alpha", "aux_loss_coef",
        "classifier_dropout", "dropout", "embd_pdrop", "embedding_dropout", "expert_dropout", "hidden_dropout",
        "hidden_dropout_prob", "initial_context_length", "initializer_factor", "layerdrop", "moe_dropout_prob",
        "output_router_logits", "pretraining_tp", "resid_pdrop", "router_aux_loss_coef",
        "router_bias_update_rate", "router_dropout", "router_jitter_noise", "router_z_loss_coef", "seq_aux",
        "z_loss_coeff"
    }
)  # fmt: skip
"""Dropouts, losses and noise of training: the reference does not use them in evaluation, nor does the loss here."""

HARMLESS = BOOKKEEPING | GENERATION

_NEUTRAL: dict[str, Any] = {
    "attention_bias": False, "embedding_multiplier": 1.0, "first_k_dense_replace": 0,
    "logits_scaling": 1.0, "mlp_bias": False, "mlp_only_layers": [], "n_group": 1, "n_shared_experts": 0,
    "num_nextn_predict_layers": 0, "residual_multiplier": 1.0, "routed_scaling_factor": 1.0, "topk_group": 1,
    "use_bias": False, "use_mla": False, "use_sliding_window": False,
}  # fmt: skip
"""Fields of some families with the value that means "without": a tool that writes them for all changes nothing."""
_NOTES = ("_", "unsloth_", "neftune_", "onnx_")
_TOKEN_IDS = ("_token_id", "_token_ids", "_token_index")


def is_harmless(name: Any, value: Any) -> bool:
    """Whether a field that no family reads changes nothing.

    A known one, a private note, a fine-tuner's, a token's name, null, or another family's feature turned off.
    """
    if value is None or name in HARMLESS or name in TRAINING_ONLY:
        return True
    if str(name).startswith(_NOTES) or str(name).endswith(_TOKEN_IDS):
        return True
    if str(name).endswith("_token") and isinstance(value, str | dict):  # num_experts_per_token is a number
        return True
    off = _NEUTRAL.get(name)
    return off is not None and value == off and isinstance(value, bool) == isinstance(off, bool)
