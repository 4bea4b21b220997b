"""How a model that is there already is tuned: which weights change, and what is put beside them.

`method` says which of these descriptions it is; a field of another method is refused.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from manyhands.config.adapter import LoraConfig
from manyhands.config.base import Strict
from manyhands.config.numbers import Layers, Multiplier, Size

Fraction = Annotated[float, Field(gt=0.0, le=1.0)]
Rank = Annotated[int, Field(strict=True, ge=1, le=4096)]
Targets = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]


class FullTuning(Strict):
    """The model's own weights: those that `trainable` chooses. A checkpoint holds the whole model."""

    method: Literal["full"] = "full"


class LoraTuning(LoraConfig):
    """LoRA (arXiv 2106.09685): W + (alpha/r)·B·A, with A and B trained; of routed experts a stack of each."""

    method: Literal["lora"] = "lora"


class EsftTuning(Strict):
    """Expert-specialised fine-tuning (arXiv 2407.01906): of the routed experts only those that this data uses most."""

    method: Literal["esft"] = "esft"
    by: Literal["token", "gate"] = "token"
    """An expert's relevance: its share of the tokens' choices, or of the sum of the gates' weights."""
    threshold: Fraction | None = None
    """Of each layer's experts the fewest whose relevance adds up to this; None: 0.2 by token, 0.1 by gate."""
    sample_tokens: Size = 131_072
    """Tokens of the training data that relevance is measured on; the paper takes 32 sequences of 4,096."""
    experts: dict[int, tuple[Annotated[int, Field(strict=True, ge=0)], ...]] | None = None
    """Layer -> the experts that are trained. None: chosen from the data when the run begins, and written here."""
    shared_experts: bool = False
    """Train the shared experts as well."""
    non_expert_modules: bool = False
    """Train everything that is no expert as well, the router too."""


class Mixture(Strict):
    """Adapters that a router mixes."""

    num_experts: Annotated[int, Field(strict=True, ge=2, le=4096)] = 4
    """Adapters beside each layer."""
    top_k: Layers | None = None
    """Adapters that a token takes; None: all, each by its share."""

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if self.top_k is not None and self.top_k > self.num_experts:
            raise ValueError(
                f"top_k = {self.top_k}: there are num_experts = {self.num_experts} adapters beside a layer"
            )
        return self


class MoloraTuning(Mixture):
    """A mixture of LoRA adapters beside the linear layers of a dense model (MoLoRA, arXiv 2309.05444)."""

    method: Literal["molora"] = "molora"
    r: Rank = 4
    """Of each adapter."""
    alpha: Multiplier = 8.0
    targets: Targets = ("attention", "dense")
    """As for lora; no routed experts."""


class MovTuning(Mixture):
    """A mixture of vectors that scale what a linear layer says (MoV, arXiv 2309.05444), in a dense model."""

    method: Literal["mov"] = "mov"
    targets: Targets = ("k_proj", "v_proj", "up_proj")
    """As for lora, no routed experts; the paper scales keys, values and what is inside the feed-forward network."""


class PerftTuning(Mixture):
    """Thin experts with a router of their own beside the frozen experts of a mixture (PERFT-R, arXiv 2411.08212)."""

    method: Literal["perft"] = "perft"
    top_k: Layers | None = 2
    """Thin experts that a token takes; None: all, each by its share."""
    r: Rank = 8
    """Their width."""
    alpha: Multiplier = 16.0


TuneConfig = FullTuning | LoraTuning | EsftTuning | MoloraTuning | MovTuning | PerftTuning
"""How a run tunes what it starts from."""
METHODS: dict[str, type[TuneConfig]] = {
    "full": FullTuning,
    "lora": LoraTuning,
    "esft": EsftTuning,
    "molora": MoloraTuning,
    "mov": MovTuning,
    "perft": PerftTuning,
}
