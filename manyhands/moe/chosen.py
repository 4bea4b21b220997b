"""A bank of which some experts are trained (ESFT, arXiv 2407.01906): those are a small stack, the others stay.

No expert is copied but the chosen, and each token's pairs are computed once: those of frozen experts in one call, those
of the chosen in another. Gradients, the router's too, are those of training the whole bank.

E experts, C of them chosen, D model width, F expert width, T tokens, K experts per token.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from manyhands.kernels import ExpertWeights, run_experts
from manyhands.moe.bank import ExpertBank
from manyhands.moe.experts import Experts


class ChosenExperts(ExpertBank):
    """Experts of `base`, frozen, but for those in `ids`, whose weights are parameters [C, …] of the names they have in
    `base`, in float32 and in the order of `ids`."""

    place_E: Tensor
    """[E] int64: where in the stack an expert is; -1: in `base`."""

    def __init__(self, base: Experts, ids: Sequence[int]) -> None:
        super().__init__(base.implementation)
        self.base, self.ids = base.requires_grad_(False), tuple(ids)
        self.activation = base.activation
        which = list(self.ids)
        device = base.down_proj.device
        place_E = torch.full((base.num_experts,), -1, device=device)
        place_E[which] = torch.arange(len(which), device=device)
        self.register_buffer("place_E", place_E, persistent=False)
        for name in base.names:
            whole = getattr(base, name)
            chosen = None if whole is None else nn.Parameter(whole.detach()[which].float())
            self.register_parameter(name, chosen)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.base.num_experts

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.base.hidden_size

    def weights(self) -> ExpertWeights:
        """Of the chosen, stacked."""
        up, up_bias, down, down_bias = (getattr(self, name) for name in self.base.names)
        return ExpertWeights(up, down, up_bias, down_bias, self.activation)

    def stacked(self, ids: Sequence[int]) -> ExpertWeights:
        """Of these experts, wherever they lie."""
        own, found = self.weights(), self.base.stacked(ids)
        at = [(i, self.ids.index(e)) for i, e in enumerate(ids) if e in self.ids]
        if not at:
            return found
        rows = torch.tensor([i for i, _ in at], device=found.down.device)
        chosen = own.stacked([place for _, place in at])

        def put(whole: Tensor, some: Tensor) -> Tensor:
            return whole.to(some.dtype).index_copy(0, rows, some)

        biases = (found.up_bias, chosen.up_bias), (found.down_bias, chosen.down_bias)
        up_bias, down_bias = (None if w is None or s is None else put(w, s) for w, s in biases)
        return ExpertWeights(
            put(found.up, chosen.up), put(found.down, chosen.down), up_bias, down_bias, self.activation
        )

    def _run(self, x: Tensor, ids: Tensor, weights: Tensor, kept: Tensor, implementation: str | None) -> Tensor:
        name = self.implementation if implementation is None else implementation
        place_TK = self.place_E[ids.clamp(min=0)]
        mine_TK = kept & (place_TK >= 0)
        y = run_experts(name, x, ids, weights, kept & ~mine_TK, self.base)
        return y + run_experts(name, x, place_TK.clamp(min=0), weights, mine_TK, self.weights())

    @torch.no_grad()
    def put_back(self) -> Experts:
        """`base` with the chosen experts in their places, rounded once to its dtype. It is changed, not copied."""
        for name in self.base.names:
            whole = getattr(self.base, name)
            if whole is not None:
                whole[list(self.ids)] = getattr(self, name).to(whole.dtype)
        return self.base
