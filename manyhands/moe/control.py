"""What no gradient moves: each router's selection bias and ReMoE's penalty, once per optimiser step.

Nothing is changed before the step is over: micro-batches and recomputed activations see one state, and a step that is
skipped moves nothing. E experts.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from manyhands.config import BalanceConfig
from manyhands.moe.balance import quantile_bias, update_bias, update_l1_
from manyhands.moe.layer import MoELayer
from manyhands.moe.load import LoadCounter
from manyhands.moe.routing import Routing
from manyhands.parallel.ranks import Ranks


class Control:
    """Looks at every micro-batch of one step, then moves what the step's numbers say. A frozen router stays."""

    def __init__(self, layers: Mapping[int, MoELayer], config: BalanceConfig) -> None:
        self._layers = {n: layer for n, layer in layers.items() if layer.router.weight.requires_grad}
        self._config = config
        self._quantiles: dict[int, Tensor] = {}

    def observe(self, layer: int, routing: Routing, share: float) -> None:
        """One micro-batch of this rank, which is `share` of the whole step."""
        if self._config.bias_update != "quantile" or layer not in self._layers:
            return
        router = self._layers[layer].router
        if (bias_E := router.e_score_correction_bias) is not None:
            choice_TE = (routing.logits if router.config.bias_on == "logit" else routing.scores).detach()
            found_E = quantile_bias(choice_TE, bias_E, routing.token_mask, router.config.num_experts_per_tok)
            self._quantiles[layer] = self._quantiles.get(layer, torch.zeros_like(bias_E)) + share * found_E

    def step(self, counters: Mapping[int, LoadCounter], ranks: Ranks) -> None:
        """Once per optimiser step; `counters` are the step's, of all ranks. Quantiles are means over micro-batches."""
        for layer, moe in self._layers.items():
            if (bias_E := moe.router.e_score_correction_bias) is None:
                continue
            if self._config.bias_update == "quantile":
                bias_E.copy_(ranks.sum(self._quantiles[layer]))
            else:
                update_bias(bias_E, counters[layer].counts, self._config.bias_update_rate)
        penalised = {n: steps for n, moe in self._layers.items() if (steps := moe.router.l1_steps) is not None}
        if penalised:
            pairs = sum(int(counters[n].counts.sum()) for n in penalised)
            tokens = sum(int(counters[n].tokens) for n in penalised)
            k = self._layers[next(iter(penalised))].router.config.num_experts_per_tok
            update_l1_(penalised.values(), pairs, tokens, k)
