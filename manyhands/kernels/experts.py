"""What a backend is given: experts, whose weights are got when asked or lie in memory, and their activation.

E experts, D model width, F expert width.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from manyhands.config.activation import ACTIVATIONS, GATED
from manyhands.errors import ConfigError
from manyhands.kernels.moment import transformed
from manyhands.kernels.twice import gradients_through
from manyhands.quant import PackedExperts

_OAI = ACTIVATIONS["swiglu_oai"]


class Bank(Protocol):
    """Where experts' weights come from: stacked weights themselves, or a module (`manyhands.moe.bank`)."""

    @property
    def num_experts(self) -> int:
        """E."""

    @property
    def hidden_size(self) -> int:
        """D."""

    @property
    def activation(self) -> str:
        """Between the two products."""

    def stacked(self, ids: Sequence[int]) -> "ExpertWeights":
        """The exact float weights of these experts, stacked in that order."""

    def in_memory(self) -> "ExpertWeights | PackedExperts | None":
        """All weights as they lie in memory; None where they are made when asked."""


class ExpertWeights(NamedTuple):
    """Stacked weights in transformers 5's in-memory layout.

    `up` is `gate_up_proj` [E, 2F, D] (gate rows first) for a gated activation and `up_proj` [E, F, D] otherwise;
    `down` is [E, D, F]; the biases are [E, 2F] or [E, F], and [E, D].
    """

    up: Tensor
    down: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None
    activation: str

    @property
    def num_experts(self) -> int:
        """E."""
        return self.down.shape[0]

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.down.shape[1]

    def stacked(self, ids: Sequence[int]) -> "ExpertWeights":
        """Of these experts, in that order."""
        if len(ids) == 1:
            which: slice | list[int] = slice(ids[0], ids[0] + 1)  # a view
        else:
            which = list(ids)
        up_bias = None if self.up_bias is None else self.up_bias[which]
        down_bias = None if self.down_bias is None else self.down_bias[which]
        return self._replace(up=self.up[which], down=self.down[which], up_bias=up_bias, down_bias=down_bias)

    def in_memory(self) -> "ExpertWeights":
        """These."""
        return self

    def cast(self, dtype: torch.dtype) -> "ExpertWeights":
        """The same weights in the compute dtype."""
        return ExpertWeights(
            self.up.to(dtype),
            self.down.to(dtype),
            None if self.up_bias is None else self.up_bias.to(dtype),
            None if self.down_bias is None else self.down_bias.to(dtype),
            self.activation,
        )


def activate(h: Tensor, activation: str) -> Tensor:
    """The expert's non-linearity: [N, 2F] -> [N, F] if gated, else [N, F] -> [N, F]. GELU is the exact (erf) one.

    Source of `swiglu_oai`: gpt-oss's model card (arXiv 2508.10925) and reference code.
    """
    if activation == "swiglu":
        return swiglu(h)
    if activation in GATED:
        gate, up = h.chunk(2, dim=-1)
        if activation == "swiglu_oai":  # the gate is clamped from above only
            gate, up = gate.clamp(max=_OAI.limit), up.clamp(-_OAI.limit, _OAI.limit)
            return (up + 1) * gate * torch.sigmoid(_OAI.alpha * gate)
        assert activation in ("geglu", "geglu_tanh")
        return F.gelu(gate, approximate="tanh" if activation == "geglu_tanh" else "none") * up
    if activation == "gelu":
        return F.gelu(h)
    if activation == "relu":
        return F.relu(h)
    raise ConfigError(f"hidden_act = {activation!r}: there is no such activation")


def _swiglu(h: Tensor) -> Tensor:
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    """silu(gate) · up in two passes each way; autograd's own chain makes six and keeps three tensors."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.save_for_backward(h)
        gate, up = h.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor | None:
        (h,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return gradients_through(_swiglu, [h], [True], dy)[0]
        gate, up = h.chunk(2, dim=-1)
        if torch.compiler.is_compiling():  # it takes no `out` that is part of another tensor
            return torch.cat((torch.ops.aten.silu_backward(dy * up, gate), dy * F.silu(gate)), dim=-1)
        dh = torch.empty_like(h)
        dgate, dup = dh.chunk(2, dim=-1)
        torch.mul(dy, F.silu(gate), out=dup)
        torch.ops.aten.silu_backward.grad_input(dy * up, gate, grad_input=dgate)
        return dh


def swiglu(h: Tensor) -> Tensor:
    """silu(h[..., :F]) · h[..., F:] (Shazeer 2020, arXiv 2002.05202): [..., 2F] -> [..., F]."""
    if transformed():
        return _swiglu(h)
    if not torch.is_grad_enabled():
        gate, up = h.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)
    y: Tensor = _SwiGLU.apply(h)  # type: ignore[no-untyped-call]
    return y
