"""The recurrent model in float64: LSTM cells written out, token by token, and every expert for every token.

B batch, S sequence, D width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from manyhands.check.oracle import moe_layer
from manyhands.check.oracle_attention import Params
from manyhands.check.oracle_dense import DenseRouting
from manyhands.config import RecurrentConfig
from manyhands.moe import Routing


@dataclass(frozen=True, slots=True)
class RecurrentOutput:
    """What `recur` returns."""

    logits: Tensor
    """[B, S, V]"""
    states: Tensor
    """[B, S, D]: what the head is multiplied with."""
    routings: Sequence[dict[int, DenseRouting]]
    """Of the one batch, by layer."""


def recur(
    config: RecurrentConfig,
    p: Params,
    ids_BS: Tensor,
    mask_BS: Tensor,
    *,
    training: bool,
    seed: int,
    tested: dict[int, Routing],
    slack: float,
) -> RecurrentOutput:
    """Without dropout. `seed` starts the routers' random draws; `tested` are the routings under test."""
    generator, routings = torch.Generator().manual_seed(seed), dict[int, DenseRouting]()
    x = p["embed_tokens.weight"][ids_BS]
    for layer in range(config.num_hidden_layers):
        x = x + _lstm(p, f"layers.{layer}.lstm.", x, mask_BS)
        if not config.is_sparse(layer):
            continue
        assert config.moe is not None
        y, routings[layer] = moe_layer(
            p,
            f"layers.{layer}.mlp.",
            x.flatten(0, 1),
            config.moe,
            training=training,
            mask_T=mask_BS.flatten(),
            ids_T=ids_BS.flatten(),
            generator=generator,
            tested=tested[layer],
            slack=slack,
            sequence_length=ids_BS.shape[1],
        )
        y = y.view_as(x)
        x = x + (1.0 / (1.0 + (-y).exp()) if config.sigmoid_output else y)
    head = p["embed_tokens.weight"] if config.tie_word_embeddings else p["lm_head.weight"]
    return RecurrentOutput(x @ head.T, x, [routings])


def _lstm(p: Params, prefix: str, x_BSD: Tensor, mask_BS: Tensor) -> Tensor:
    """h of every real token, 0 of padding, which changes nothing of what is remembered."""
    h = c = torch.zeros_like(x_BSD[:, 0])
    rows = []
    for x_BD, real_B in zip(x_BSD.unbind(1), mask_BS.unbind(1), strict=True):
        gates = x_BD @ p[prefix + "weight_ih"].T + h @ p[prefix + "weight_hh"].T
        gates = gates + p[prefix + "bias"] if prefix + "bias" in p else gates
        i, f, g, o = gates.chunk(4, -1)
        new_c = c / (1.0 + (-f).exp()) + g.tanh() / (1.0 + (-i).exp())
        new_h = new_c.tanh() / (1.0 + (-o).exp())
        real_B1 = real_B[:, None]
        c, h = torch.where(real_B1, new_c, c), torch.where(real_B1, new_h, h)
        rows.append(torch.where(real_B1, h, 0.0))
    return torch.stack(rows, 1)
