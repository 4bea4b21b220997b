"""What a layer's inputs look like on sample text: the mean square of each input weighs its rounding error.

With y = x·Wᵀ the expected squared error of an output is Σ_k E[x_k²]·(W − Ŵ)_k², as far as the inputs are uncorrelated.

T tokens, E experts, D model width, F expert width, K inputs of a linear layer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyhands.kernels.experts import activate
from manyhands.layers.linear import Linear
from manyhands.moe import Experts, Routing

MIN_TOKENS = 16
"""An expert that saw fewer is weighed by what all tokens would have been to it."""
MOST_TOKENS = 1024
"""All tokens, for that: the first so many."""


@dataclass(slots=True)
class Seen:
    """One block's inputs, on the sample."""

    linear: dict[str, Tensor] = field(default_factory=dict)
    """Module within the block -> [K] float32."""
    up: Tensor | None = None
    """[E, D] float32."""
    down: Tensor | None = None
    """[E, F] float32."""
    tokens_per_expert: list[int] = field(default_factory=list)

    @property
    def too_few(self) -> list[int]:
        """Experts that saw fewer than `MIN_TOKENS`."""
        return [e for e, count in enumerate(self.tokens_per_expert) if count < MIN_TOKENS]


@contextmanager
def watching(block: nn.Module) -> Iterator[Seen]:
    """Run the block once inside; what its linear layers and experts were given is then in the `Seen`."""
    seen, handles = Seen(), []
    for name, module in block.named_modules():
        if isinstance(module, Linear):

            def of_linear(_: nn.Module, arguments: tuple[Any, ...], name: str = name) -> None:
                seen.linear[name] = mean_square(arguments[0])

            handles.append(module.register_forward_pre_hook(of_linear))
        elif isinstance(module, Experts):
            handles.append(module.register_forward_pre_hook(lambda m, arguments: _experts(seen, m, *arguments)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def mean_square(x: Tensor) -> Tensor:
    """[..., K] -> [K] float32."""
    return x.detach().flatten(0, -2).float().square().mean(0)


@torch.no_grad()
def _experts(seen: Seen, experts: nn.Module, x_TD: Tensor, routing: Routing) -> None:
    assert isinstance(experts, Experts)
    up_E2FD, _, up_bias, _, activation = experts.weights()
    counts = routing.expert_counts().tolist()
    ups, downs = [], []
    for e, count in enumerate(counts):
        chose_T = ((routing.expert_ids == e) & routing.kept).any(-1)
        x = x_TD[chose_T] if count >= MIN_TOKENS else x_TD[:MOST_TOKENS]
        bias = None if up_bias is None else up_bias[e].to(x.dtype)
        ups.append(mean_square(x))
        downs.append(mean_square(activate(F.linear(x, up_E2FD[e].to(x.dtype), bias), activation)))
    seen.up, seen.down, seen.tokens_per_expert = torch.stack(ups), torch.stack(downs), counts
