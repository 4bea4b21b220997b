"""What training a decoder holds in memory, on each of W devices: exact for what lasts, by formula for what passes.

Weights, gradients and moments are float32 and shared out evenly over all W devices (`train/layout.py`). Blocks compute
in bfloat16: one device casts the matrices of all blocks, and keeps what it cast until the backward pass; several gather
two blocks at a time, each device those experts that its `ep` gives it.

D width, K experts per token, F expert width. Source: the tensors that this package's modules keep for the backward
pass, with `grouped_mm` experts; a test counts them.
"""

from dataclasses import dataclass
from math import prod

from manyhands.config import ModelConfig
from manyhands.config.activation import GATED
from manyhands.config.optim_groups import optim_group
from manyhands.config.shapes import tensor_shapes
from manyhands.plan.count import BUFFERS

FLOAT, HALF = 4, 2
"""Bytes of float32 and bfloat16."""
OPTIMIZERS = ("muon", "adamw", "adafactor")
_BY_MUON = ("hidden", "gate_up")
_IDS = 24
"""Bytes of one routed pair beside its rows: where it goes, by which weight, and its place among the others."""


@dataclass(frozen=True, slots=True)
class Held:
    """Bytes on one device."""

    weights: float
    gradients: float
    moments: float
    """What the optimiser keeps."""
    blocks: float
    """Matrices in bfloat16 that blocks compute with."""
    activations: float | None
    """None: of this model's attention or router it is not known what it keeps."""

    @property
    def total(self) -> float | None:
        """All of it."""
        lasting = self.weights + self.gradients + self.moments + self.blocks
        return None if self.activations is None else lasting + self.activations


def held(
    config: ModelConfig, optimizer: str, tokens: int, *, devices: int = 1, ep: int = 1, recompute: bool = False
) -> Held:
    """Of a device that runs `tokens` tokens at once, one of `devices` of which `ep` share out one set of experts.

    `recompute`: each block's activations are computed again in the backward pass (`train.recompute`).
    """
    shapes = {name: shape for name, shape in tensor_shapes(config).items() if not name.endswith(BUFFERS)}
    weights = FLOAT * sum(map(prod, shapes.values())) / devices
    moments = FLOAT * sum(moments_of(name, shape, optimizer) for name, shape in shapes.items()) / devices
    cast = [_cast(shapes, layer, ep) for layer in range(config.num_hidden_layers)]
    at_once = (1 if recompute else len(cast)) if devices == 1 else 2
    return Held(weights, weights, moments, HALF * sum(sorted(cast)[-at_once:]), activations(config, tokens, recompute))


def moments_of(name: str, shape: tuple[int, ...], optimizer: str) -> int:
    """Numbers that an optimiser of `OPTIMIZERS` keeps of a parameter; Muon's other parameters are AdamW's."""
    if optimizer == "adafactor":
        return prod(shape) if len(shape) < 2 else prod(shape[:-2]) * (shape[-2] + shape[-1])
    by_muon = optimizer == "muon" and optim_group(name, len(shape)) in _BY_MUON
    return prod(shape) * (1 if by_muon else 2)


def _cast(shapes: dict[str, tuple[int, ...]], layer: int, ep: int) -> float:
    """Numbers in the matrices of a block, with the experts that one device computes."""
    mine = [
        (n, s) for n, s in shapes.items() if n.startswith(f"layers.{layer}.") and len(s) > 1 and ".router." not in n
    ]
    return sum(prod(shape) / (ep if ".experts." in name else 1) for name, shape in mine)


def known(config: ModelConfig) -> bool:
    """Whether it is known what the blocks keep.

    Explicit scores (latent attention, sinks, a soft cap) grow with the square of the length; routers that are no top-k
    and networks without a gate keep other things.
    """
    a = config.attention
    plain = a.kind == "gqa" and not a.sinks and a.attn_logit_softcap is None and not config.output_norms
    acts = {config.hidden_act} | ({config.moe.hidden_act} if config.moe is not None else set())
    return plain and acts <= GATED and (config.moe is None or config.moe.router.select == "topk")


def activations(config: ModelConfig, tokens: int, recompute: bool = False) -> float | None:
    """Bytes that all blocks keep for the backward pass of `tokens` tokens; None where that is not known.

    With `recompute` what enters each block, and the block that keeps most. The head and the loss are not in it.
    """
    if not known(config):
        return None
    blocks = [tokens * _kept(config, layer) for layer in range(config.num_hidden_layers)]
    if not recompute:
        return sum(blocks)
    routings = sum(tokens * _routing(config) for _ in config.sparse_layers)
    return tokens * config.hidden_size * HALF * len(blocks) + routings + max(blocks)


def _kept(config: ModelConfig, layer: int) -> float:
    """Bytes of one token in one block: rows in bfloat16; scores, statistics and what a router reads in float32."""
    D, a = config.hidden_size, config.attention
    queries, keys = a.num_attention_heads * a.head_dim, a.kv_heads * a.head_dim
    rows = 4 * D + 2 * queries + 2 * keys  # both norms' inputs and outputs; q, k, v and what attention gives
    rows += queries + keys if a.qk_norm != "none" else 0
    statistics = 2 + a.num_attention_heads + (a.num_attention_heads + a.kv_heads if a.qk_norm != "none" else 0)
    if not config.is_sparse(layer):
        return HALF * (rows + 3 * config.intermediate_size) + FLOAT * statistics
    assert config.moe is not None
    K, F = config.moe.router.num_experts_per_tok, config.moe.moe_intermediate_size
    rows += K * (2 * D + 3 * F) + 3 * config.moe.shared_width
    return HALF * rows + FLOAT * (statistics + D) + _routing(config)


def _routing(config: ModelConfig) -> float:
    """Bytes of one token's routing."""
    assert config.moe is not None
    router = config.moe.router
    return FLOAT * router.num_experts + _IDS * router.num_experts_per_tok
