"""A router that has learned nothing: what a trained one is held against.

    T tokens   D model width   E experts   K experts per token

Its rows have random directions, each as long as the trained row, and it has an offset per expert for selection, fitted
so that its experts are as busy as the trained ones. What it shows of tokens, words or topics is what any projection of
these hidden states shows; only what the trained router shows beyond that has been learned by it.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from manyhands.moe import Router
from manyhands.moe.router import linear_float32
from manyhands.moe.select import limit_to_groups
from manyhands.parallel.ranks import Ranks
from manyhands.parallel.shards import whole

_FIT_STEPS = 200
Key = TypeVar("Key")


class RandomRouter:
    """A router that has learned nothing, for the hidden states and the loads of a trained one."""

    def __init__(
        self, router: Router, states_TD: Tensor, expert_ids_TK: Tensor, seed: int, ranks: Ranks | None = None
    ) -> None:
        """With `ranks` it is the same on all of them, fitted to the hidden states and loads of rank 0."""
        self.config = router.config
        generator = torch.Generator().manual_seed(seed)
        trained_ED = whole(router.weight.detach()).float().cpu()
        rows_ED = torch.randn(trained_ED.shape, generator=generator)
        rows_ED *= trained_ED.norm(dim=1, keepdim=True) / rows_ED.norm(dim=1, keepdim=True)
        self.weight_ED = rows_ED.to(states_TD.device)
        self.offset_E = torch.zeros(len(rows_ED), device=states_TD.device)
        if ranks is None or ranks.rank == 0:
            self._fit(linear_float32(states_TD.float(), self.weight_ED), expert_ids_TK)
        if ranks is not None:
            self.offset_E = ranks.sum(self.offset_E)  # zero elsewhere

    def _fit(self, logits_TE: Tensor, expert_ids_TK: Tensor) -> None:
        """Move the offsets until the loads are those of `expert_ids_TK`, by steps that grow smaller."""
        E = logits_TE.shape[1]
        wanted_E = _load(expert_ids_TK, E)
        spread = logits_TE.std()
        best, least = self.offset_E, torch.inf
        for step in range(_FIT_STEPS):
            wrong_E = wanted_E - _load(self._select(logits_TE), E)
            if float(wrong_E.abs().sum()) < least:
                best, least = self.offset_E, float(wrong_E.abs().sum())
            self.offset_E = self.offset_E + spread * (0.3 - 0.28 * step / _FIT_STEPS) * (E * wrong_E).clamp(-1, 1)
        self.offset_E = best

    def __call__(self, states_TD: Tensor) -> Tensor:
        """[T, K] expert numbers for hidden states [T, D], best first."""
        return self._select(linear_float32(states_TD.float(), self.weight_ED))

    def _select(self, logits_TE: Tensor) -> Tensor:
        choice_TE = logits_TE + self.offset_E
        if self.config.n_group > 1:
            choice_TE = limit_to_groups(choice_TE, self.config)
        return choice_TE.topk(self.config.num_experts_per_tok).indices


def _load(ids_TK: Tensor, num_experts: int) -> Tensor:
    """[E]: share of all pairs."""
    counts = torch.bincount(ids_TK[ids_TK >= 0], minlength=num_experts).float()
    return counts / counts.sum().clamp(min=1)


@contextmanager
def recorded_inputs(modules: Mapping[Key, nn.Module]) -> Iterator[dict[Key, Tensor]]:
    """The first argument of each module's last call, under its key, while the block lasts."""
    inputs: dict[Key, Tensor] = {}
    handles = []
    for key, module in modules.items():

        def keep(_: nn.Module, arguments: tuple[Tensor, ...], key: Key = key) -> None:
            inputs[key] = arguments[0]

        handles.append(module.register_forward_pre_hook(keep))
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()
