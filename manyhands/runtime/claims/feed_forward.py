"""Dense feed-forward networks, shared experts among them."""

from torch import nn

from manyhands.config.activation import GATED
from manyhands.kernels.native.library import ACTIVATION_CODES
from manyhands.layers.feed_forward import FeedForward
from manyhands.runtime.builder import ACTIVATE, Builder, Unfit
from manyhands.runtime.claims import linear


def emit(b: Builder, mlp: nn.Module, to: str) -> None:
    """From `normed` into buffer `to`."""
    if type(mlp) is not FeedForward or mlp.activation not in ACTIVATION_CODES:
        raise Unfit(f"{type(mlp).__name__} has no claim, or its activation none")
    up_proj, F = mlp.up_proj, linear.linear_of(b, mlp.up_proj, b.D).weight.outputs
    if F % 16:
        raise Unfit(f"a feed-forward network of width {F}, no multiple of 16")
    gated = mlp.gate_proj is not None
    if gated != (mlp.activation in GATED):
        raise Unfit("a gate that the activation does not say")
    layers = {"gate": (mlp.gate_proj, F), "up": (up_proj, F)} if gated else {"gate": (up_proj, F)}
    linear.emit(b, "normed", b.D, layers)
    up, kind = b.buffer("up", F) if gated else None, ACTIVATION_CODES[mlp.activation]
    b.call(ACTIVATE, b.buffer("gate", F), up, b.buffer("act", F), n=(kind, 0))
    linear.emit(b, "act", F, {to: (mlp.down_proj, b.D)})
