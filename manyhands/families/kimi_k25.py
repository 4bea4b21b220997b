"""Kimi K2.5, its language model: K2's under `text_config` and `language_model.`, with a vision tower.

The vision tower and its projector are not computed with; a round trip keeps them. The published experts are INT4 in
groups of 32 (`checkpoint/quantized/`). `text_config` calls itself `kimi_k2`.
"""

from collections.abc import Iterator
from dataclasses import replace

from manyhands.config import ModelConfig
from manyhands.families.base import LLAMA_EXPERTS, Json, Layout, Piece
from manyhands.families.deepseek import RENAME
from manyhands.families.deepseek_v3 import DEEPSEEK_V3, mtp_layers

_LAYOUT = Layout(LLAMA_EXPERTS, RENAME, prefix="language_model.model.", head="language_model.lm_head.weight")


def _kept(fields: Json) -> tuple[str, ...]:
    return ("vision_tower.", "mm_projector.", *(f"language_model.{name}" for name in mtp_layers(fields)))


def _pieces(config: ModelConfig) -> Iterator[Piece]:
    yield from _LAYOUT(config)


def _write(config: ModelConfig) -> Json:
    own = {"model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"]}
    return DEEPSEEK_V3.write(config) | own


KIMI_K25 = replace(
    DEEPSEEK_V3,
    model_type="kimi_k25",
    architecture="KimiK25ForConditionalGeneration",
    published="Kimi K2.5 (language model)",
    write=_write,
    pieces=_pieces,
    nearest=False,
    kept=_kept,
    text_field="text_config",
)
