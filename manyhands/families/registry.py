"""All families, by `model_type`. The order is the order in which a fit for our own models is looked for."""

from manyhands.config import suggest
from manyhands.errors import ConfigError
from manyhands.families.base import Family
from manyhands.families.deepseek import DEEPSEEK
from manyhands.families.deepseek_v2 import DEEPSEEK_V2
from manyhands.families.deepseek_v3 import DEEPSEEK_V3
from manyhands.families.dots1 import DOTS1
from manyhands.families.ernie4_5_moe import ERNIE4_5_MOE
from manyhands.families.glm4_moe import GLM4_MOE
from manyhands.families.gpt_oss import GPT_OSS
from manyhands.families.granitemoe import GRANITEMOE
from manyhands.families.grok_1 import GROK_1
from manyhands.families.hunyuan_v1_moe import HUNYUAN_V1_MOE
from manyhands.families.kimi_k2 import KIMI_K2
from manyhands.families.kimi_k25 import KIMI_K25
from manyhands.families.llama import LLAMA
from manyhands.families.llama4 import LLAMA4, LLAMA4_TEXT
from manyhands.families.manyhands import MANYHANDS
from manyhands.families.minimax_m2 import MINIMAX_M2
from manyhands.families.mixtral import MIXTRAL
from manyhands.families.olmoe import OLMOE
from manyhands.families.phimoe import PHIMOE
from manyhands.families.qwen2_moe import QWEN2_MOE
from manyhands.families.qwen3 import QWEN3
from manyhands.families.qwen3_moe import QWEN3_MOE
from manyhands.families.switch_transformers import SWITCH_TRANSFORMERS
from manyhands.families.t5 import T5

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        MANYHANDS,
        LLAMA,
        QWEN3,
        MIXTRAL,
        QWEN3_MOE,
        QWEN2_MOE,
        OLMOE,
        DOTS1,
        DEEPSEEK,
        DEEPSEEK_V2,
        DEEPSEEK_V3,
        KIMI_K2,
        KIMI_K25,
        GLM4_MOE,
        GPT_OSS,
        GRANITEMOE,
        ERNIE4_5_MOE,
        MINIMAX_M2,
        HUNYUAN_V1_MOE,
        PHIMOE,
        GROK_1,
        LLAMA4_TEXT,
        LLAMA4,
        T5,
        SWITCH_TRANSFORMERS,
    )
}


_DELTA_NET = "gated delta networks in three layers of four, and attention whose output is gated"
_V4 = "compressed sparse attention with an indexer, hyper-connections, and a low-rank output projection in groups"
NOT_EXPRESSED: dict[str, tuple[str, str]] = {
    "qwen3_next": ("Qwen3-Next", _DELTA_NET),
    "qwen3_5_moe": ("Qwen3.5", _DELTA_NET),
    "qwen3_5_moe_text": ("Qwen3.5", _DELTA_NET),
    "deepseek_v4": ("DeepSeek-V4", _V4),
}
"""Published mixtures that are asked for and not read: their name, and what they have that no block here computes."""


def family_named(model_type: str, where: str = "model_type") -> Family:
    """The family, or `ConfigError` with the list of what is known, or with what a known model has that we have not."""
    if model_type in NOT_EXPRESSED:
        model, parts = NOT_EXPRESSED[model_type]
        raise ConfigError(f"{where}: model_type = {model_type!r} ({model}) is not read, for manyhands lacks {parts}")
    if model_type not in FAMILIES:
        shown = repr(model_type)[:80]
        near = suggest(model_type, sorted(FAMILIES))
        known = "" if near.startswith("allowed") else f" Known: {', '.join(sorted(FAMILIES))}"
        raise ConfigError(f"{where}: model_type = {shown} is not a family manyhands knows; {near}{known}")
    return FAMILIES[model_type]
