"""What LoRA adds to a model, and where (Hu et al. 2021, arXiv 2106.09685).

W' = W + s·B·A, A [r, in], B [out, r], s = α/r, or α/√r (rsLoRA, arXiv 2312.03732). Names are PEFT's where it has them.
"""

import math

from pydantic import Field, model_validator

from manyhands.config.base import Strict

TARGET_GROUPS = ("attention", "dense", "shared", "routed")
"""Attention's projections, dense feed-forward networks, shared experts, routed experts."""
MOST_RANK = 4096


class LoraConfig(Strict):
    """Low-rank adapters. Routers, norms, embeddings and the head stay as they are."""

    r: int = Field(8, ge=1, le=MOST_RANK, strict=True)
    """Rank of A and B."""
    alpha: float = Field(16.0, gt=0.0)
    """PEFT's `lora_alpha`: what is added is multiplied by alpha/r."""
    use_rslora: bool = False
    """Multiply by alpha/√r in the place of alpha/r, so that a higher rank learns at the same rate."""
    targets: tuple[str, ...] = TARGET_GROUPS
    """`attention`, `dense` (feed-forward networks), `shared` and `routed` (experts), or ends of names as PEFT's
    `target_modules` has them (`q_proj`, `experts.down_proj`, `layers.3.self_attn.o_proj`). What a model lacks is passed
    over among the four; a name must be there. Routed experts' gate and up are one matrix, `gate_up_proj`."""
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Of what goes into A, in training. Not with routed experts, as in PEFT."""

    @model_validator(mode="after")
    def _some_targets(self) -> "LoraConfig":
        if not self.targets:
            raise ValueError(f"targets: name at least one of {', '.join(TARGET_GROUPS)}, or of the model's matrices")
        return self

    @property
    def scale(self) -> float:
        """s, which B·A is multiplied by."""
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)
