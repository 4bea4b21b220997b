"""Experts ranked by what their absence costs: the loss on a text with each of them off, beside the loss as it is.

Off here is masked: its tokens go to their next choice, as in `generate --without-expert`. What is left of a token when
nobody takes its place is `compare.worth`'s.

B texts, S tokens each, E experts.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from manyhands.compare.passes import token_nats
from manyhands.engine.runner import Runner
from manyhands.errors import DataError, UserError
from manyhands.models import Decoder
from manyhands.moe import Mask
from manyhands.moe.edit import NO_EDITS, Edits, check_edits


@dataclass(frozen=True, slots=True)
class Ablated:
    """One expert, off."""

    layer: int
    expert: int
    increase: float
    """Of the loss, nats per token."""
    low: float
    """95 % interval of the increase, over texts (paired: the same texts with and without)."""
    high: float
    share: float
    """Of the layer's (token, expert) pairs, when it is on. 1/E is even."""


@dataclass(frozen=True, slots=True)
class Ablation:
    """What `ablate` found."""

    loss: float
    """As the model is, nats per token."""
    tokens: int
    experts: list[Ablated]
    """The dearest first."""


def ablate(
    model: Decoder,
    ids_BS1: Tensor,
    *,
    experts: Iterable[tuple[int, int]] | None = None,
    batch_size: int = 8,
    draws: int = 1000,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Ablation:
    """The rise of the loss on texts [B, S + 1] when each of `experts` (layer, expert; None: all) is off, one at a time.

    Each token but a text's first is predicted. An expert costs one pass over the texts; `progress` is called with the
    number of passes done, of 1 + len(experts). Intervals are bootstrapped over texts (percentiles of `draws` draws).
    Raises `DataError` for fewer than two texts or tokens, `UserError` for a model without routers and `ConfigError`
    for an expert that is not there or without which too few are left.
    """
    if ids_BS1.dim() != 2 or ids_BS1.shape[0] < 2 or ids_BS1.shape[1] < 2:
        raise DataError(f"texts are {list(ids_BS1.shape)}: an interval needs two texts, of two tokens at least")
    routers = {layer: mlp.router.config for layer, mlp in model.sparse_layers().items()}
    if not routers:
        raise UserError("the model has no mixture-of-experts layer: there is no expert to do without")
    chosen = [(n, e) for n, r in routers.items() for e in range(r.num_experts)] if experts is None else list(experts)
    for layer, expert in chosen:
        check_edits({layer: Mask((expert,))}, routers)
    runner = Runner(model)
    base_B, counts = _losses(runner, ids_BS1, NO_EDITS, batch_size)
    done = 1
    rng, B, S = np.random.default_rng(seed), *ids_BS1.shape[:1], ids_BS1.shape[1] - 1
    drawn_XB = rng.integers(0, B, (draws, B))
    found = []
    for layer, expert in chosen:
        if progress is not None:
            progress(done)
        loss_B, _ = _losses(runner, ids_BS1, {layer: Mask((expert,))}, batch_size)
        rise_B = (loss_B - base_B) / S
        low, high = np.quantile(rise_B[drawn_XB].mean(1), (0.025, 0.975))
        share = float(counts[layer][expert] / counts[layer].sum())
        found.append(Ablated(layer, expert, float(rise_B.mean()), float(low), float(high), share))
        done += 1
    if progress is not None:
        progress(done)
    found.sort(key=lambda a: (-a.increase, a.layer, a.expert))
    return Ablation(float(base_B.mean() / S), B * S, found)


def _losses(runner: Runner, ids_BS1: Tensor, edits: Edits, batch_size: int) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """[B] float64, nats of each text, and how often each expert was chosen."""
    found, counts = [], dict[int, np.ndarray]()
    for ids in torch.split(ids_BS1, batch_size):
        hidden = runner.score(ids[:, :-1], None, edit=edits)
        with torch.inference_mode():
            states_TD, targets_BS = hidden.states.flatten(0, 1), ids[:, 1:]
            nats_T = token_nats(runner.logits, states_TD, targets_BS.flatten(), runner.model.config.vocab_size)
            found += nats_T.view(targets_BS.shape).double().sum(1).tolist()
        for layer, routing in hidden.routings.items():
            counts[layer] = counts.get(layer, 0) + routing.expert_counts().numpy()
    return np.array(found), counts
