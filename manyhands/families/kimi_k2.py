"""Kimi K2 (arXiv 2507.20534): DeepSeek-V3's layout with 384 experts, one group and 64 heads."""

from dataclasses import replace

from manyhands.families.deepseek_v3 import DEEPSEEK_V3

KIMI_K2 = replace(
    DEEPSEEK_V3,
    model_type="kimi_k2",
    architecture="DeepseekV3ForCausalLM",
    published="Kimi K2, K2 Thinking",
    nearest=False,
)
