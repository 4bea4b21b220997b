"""What no gradient moves: selection biases, ReMoE's penalty, Default MoE's averages; once per optimiser step.

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
from manyhands.moe.unchosen import sum_outputs, update_averages_
from manyhands.parallel.ranks import Ranks


class Control:
    """Looks at every micro-batch of one step, then moves what the step's numbers say. A frozen router stays."""

    def __init__(self, layers: Mapping[int, MoELayer], config: BalanceConfig) -> None:
        self._layers = {n: layer for n, layer in layers.items() if layer.router.weight.requires_grad}
        self._config = config
        self._quantiles: dict[int, Tensor] = {}
        self._averages = {n: moe.average_outputs for n, moe in layers.items() if moe.average_outputs is not None}
        self._decays = {n: layers[n].average_decay for n in self._averages}
        self._said: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def wants_outputs(self) -> bool:
        """Whether routings must hold their experts' outputs."""
        return bool(self._averages)

    def observe(self, layer: int, routing: Routing, share: float) -> None:
        """One micro-batch of this rank, which is `share` of the whole step."""
        if layer in self._averages:
            found = sum_outputs(routing)
            before = self._said.get(layer)
            self._said[layer] = found if before is None else (before[0] + found[0], before[1] + found[1])
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
        for layer, averages_ED in self._averages.items():
            sums_ED, counts_E = map(ranks.sum, self._said[layer])
            update_averages_(averages_ED, sums_ED, counts_E, self._decays[layer])
        penalised = {n: steps for n, moe in self._layers.items() if (steps := moe.router.l1_steps) is not None}
        if penalised:
            pairs = sum(int(counters[n].counts.sum()) for n in penalised)
            tokens = sum(int(counters[n].tokens) for n in penalised)
            k = self._layers[next(iter(penalised))].router.config.num_experts_per_tok
            update_l1_(penalised.values(), pairs, tokens, k)
