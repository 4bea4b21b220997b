"""The first mixtures: Jacobs, Jordan, Nowlan, Hinton 1991, and the hierarchy of Jordan and Jacobs 1994.

They are regressions, from numbers to numbers. There is no text, and every expert is evaluated for every example.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from manyhands.config.model import AnyModelConfig, register
from manyhands.config.numbers import Size

_Few = Annotated[int, Field(strict=True, ge=1, le=1 << 12)]


@register
class LocalExpertsConfig(AnyModelConfig):
    """Linear experts, perhaps with a sigmoid, and a linear gate with a softmax (Neural Computation 3(1), 79–87)."""

    kind: Literal["mixture_1991"] = "mixture_1991"
    num_inputs: Size
    num_outputs: Size
    num_experts: _Few = 4
    output: Literal["linear", "sigmoid"] = "linear"
    """What an expert does with its weighted sums: nothing, or a sigmoid each (targets between 0 and 1)."""
    objective: Literal["competitive", "gated", "cooperative"] = "competitive"
    """What is minimised: −log Σ p exp(−½‖d−o‖²/σ²), Σ p ‖d−o‖², or ‖d − Σ p o‖²."""
    sigma: Annotated[float, Field(gt=0.0, le=1e6)] = 1.0
    """In which unit the competitive objective measures distances: targets that lie far apart need a large one."""


@register
class HierarchicalExpertsConfig(AnyModelConfig):
    """A tree of softmax gates over linear experts with Gaussian noise (Neural Computation 6(2), 181–214)."""

    kind: Literal["hierarchy_1994"] = "hierarchy_1994"
    num_inputs: Size
    num_outputs: Size
    branching: Annotated[tuple[_Few, ...], Field(min_length=1, max_length=12)] = (2, 2)
    """From the root down, into how many branches each gate of a level divides. Their product is the experts' number."""

    @model_validator(mode="after")
    def _consistent(self) -> "HierarchicalExpertsConfig":
        if self.num_experts > 1 << 12:
            raise ValueError(f"branching = {list(self.branching)}: {self.num_experts} experts are more than 4096")
        return self

    @property
    def num_experts(self) -> int:
        """The leaves."""
        return self.gates_of(len(self.branching))

    def gates_of(self, level: int) -> int:
        """Gates of a level; the root is level 0."""
        count = 1
        for branches in self.branching[:level]:
            count *= branches
        return count
