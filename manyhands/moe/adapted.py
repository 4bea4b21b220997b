"""Experts with LoRA beside their weights, which stay as they are, stacked or packed.

    h = W_e x + s·B_e(A_e x)        for gate and up together, and the same for down

Two thin grouped products beside each of the experts' own, on the same sorted rows: s·B·A is never made
(`manyhands.kernels.low_rank`). Stacks go with their experts, also onto other ranks.

E experts, D model width, F expert width, r rank.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from manyhands.config.activation import GATED
from manyhands.errors import ConfigError
from manyhands.kernels import ExpertWeights, run_experts
from manyhands.kernels.low_rank import AdaptedWeights, LowRankWeights
from manyhands.layers.adapted import LowRank
from manyhands.moe.bank import ExpertBank
from manyhands.moe.exchange import local
from manyhands.quant import PackedExperts


class AdaptedExperts(ExpertBank):
    """A bank around another.

    `implementation`: `auto` and `grouped_mm` are the two thin products; `eager` makes one expert's W + s·B·A at a time
    and is what they are held against. `native` has no kernel for it, and is refused.
    """

    def __init__(self, base_layer: ExpertBank, ranks: Mapping[str, tuple[int, float]]) -> None:
        """`ranks`: matrix (`gate_up_proj`, or `up_proj` without a gate; `down_proj`) -> (r, s), of those with LoRA.

        Raises `ConfigError` for experts on disk.
        """
        super().__init__(base_layer.implementation)
        if base_layer.fetched_experts() is not None:
            raise ConfigError("experts that lie on disk take no adapter: load the model without a memory budget")
        self.activation = base_layer.activation
        self.base_layer = base_layer.requires_grad_(False)
        shapes, device = shapes_of(base_layer)
        for name, shape in shapes.items():
            self.add_module(name, LowRank(shape, *ranks[name], device) if name in ranks else None)

    @property
    def up_name(self) -> str:
        """Of the first matrix."""
        return up_name(self.activation)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.base_layer.num_experts

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.base_layer.hidden_size

    def low_ranks(self) -> dict[str, LowRank]:
        """By the name of the matrix they are beside."""
        found = {name: getattr(self, name) for name in (self.up_name, "down_proj")}
        return {name: low for name, low in found.items() if low is not None}

    def weights(self) -> AdaptedWeights:
        """The experts as backends take them."""
        return AdaptedWeights(self.base_layer, *self._both())

    def own_experts(self) -> AdaptedWeights:
        """The same of this process's own experts: their A and B lie with them."""
        return AdaptedWeights(self.base_layer.own_experts(), *self._both())

    def _both(self) -> tuple[LowRankWeights | None, LowRankWeights | None]:
        return self._factors(self.up_name), self._factors("down_proj")

    def _factors(self, name: str) -> LowRankWeights | None:
        low: LowRank | None = getattr(self, name)
        return None if low is None else LowRankWeights(local(low.lora_A), local(low.lora_B), low.scale)

    def stacked(self, ids: Sequence[int]) -> ExpertWeights:
        """W + s·B·A of these experts, float32 at least: what the thin products stand for."""
        return self.weights().stacked(ids)

    def reset_parameters(
        self, std: float = 0.0, residual_std: float | None = None, generator: torch.Generator | None = None
    ) -> None:
        """Fresh A and B; the experts themselves stay as they are."""
        for low in self.low_ranks().values():
            low.reset_parameters(generator)

    def _run(self, x: Tensor, ids: Tensor, weights: Tensor, kept: Tensor, implementation: str | None) -> Tensor:
        name = self.implementation if implementation is None else implementation
        if self.placement is not None:
            return self.placement.run(name, x, ids, weights, kept, self.own_experts())
        return run_experts(name, x, ids, weights, kept, self.weights())


def up_name(activation: str) -> str:
    """What the experts' first matrix is called."""
    return "gate_up_proj" if activation in GATED else "up_proj"


def shapes_of(bank: ExpertBank) -> tuple[dict[str, tuple[int, ...]], torch.device]:
    """The shapes of a bank's two matrices, [E, 2F or F, D] and [E, D, F], by name; and where they lie."""
    lie, E = bank.in_memory(), bank.num_experts
    if isinstance(lie, PackedExperts):
        shapes = [(E, m.parts * m.outputs, m.inputs) for m in lie.layout.matrices]
        device = lie.records.device
    else:
        weights = bank.stacked([0]) if lie is None else lie
        shapes = [(E, *t.shape[1:]) for t in (weights.up, weights.down)]
        device = weights.up.device
    return dict(zip((up_name(bank.activation), "down_proj"), shapes, strict=True)), device
