"""How a model that is there already is tuned: which weights change, and what is put beside them.

`method` says which of these descriptions it is; a field of another method is refused.
"""

from typing import Annotated, Literal

from pydantic import Field

from manyhands.config.base import Strict
from manyhands.config.numbers import Layers, Multiplier, Size

Fraction = Annotated[float, Field(gt=0.0, le=1.0)]
Targets = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]


class FullTuning(Strict):
    """The model's own weights: those that `trainable` chooses. A checkpoint holds the whole model."""

    method: Literal["full"] = "full"


class LoraTuning(Strict):
    """LoRA (arXiv 2106.09685): W + (alpha/r)·B·A, with A and B trained; for routed experts a stack of each."""

    method: Literal["lora"] = "lora"
    r: Annotated[int, Field(strict=True, ge=1, le=4096)] = 8
    """Rank of A and B."""
    alpha: Multiplier = 16.0
    use_rslora: bool = False
    """Scale by alpha/√r in the place of alpha/r (arXiv 2312.03732)."""
    targets: Targets = ("attention", "dense", "shared", "routed")
    """`attention`, `dense` (feed-forward networks), `shared` and `routed` (experts), or names of layers as PEFT's
    `target_modules` has them (`q_proj`). What a model lacks is passed over among the four; a name must be there."""


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


class MoloraTuning(Strict):
    """A soft mixture of LoRA adapters on the linear layers of a dense model (MoLoRA, arXiv 2309.05444)."""

    method: Literal["molora"] = "molora"
    num_experts: Layers = 4
    """Adapters beside each layer."""
    top_k: Layers | None = None
    """Adapters that a token takes; None: all, each by its share."""
    r: Annotated[int, Field(strict=True, ge=1, le=4096)] = 4
    alpha: Multiplier = 8.0
    targets: Targets = ("attention", "dense")
    """As for lora."""


class MovTuning(Strict):
    """A soft mixture of vectors that scale what a layer says (MoV, arXiv 2309.05444), on a dense model."""

    method: Literal["mov"] = "mov"
    num_experts: Layers = 4
    """Vectors beside each layer."""
    top_k: Layers | None = None
    """Vectors that a token takes; None: all, each by its share."""
    targets: Targets = ("k_proj", "v_proj", "up_proj")
    """As for lora; the paper scales keys, values and what is inside the feed-forward network."""


class PerftTuning(Strict):
    """Thin experts with a router of their own beside the frozen experts of a mixture (PERFT-R, arXiv 2411.08212)."""

    method: Literal["perft"] = "perft"
    num_experts: Layers = 4
    """Thin experts beside each layer's own."""
    top_k: Layers = 2
    r: Annotated[int, Field(strict=True, ge=1, le=4096)] = 8
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
