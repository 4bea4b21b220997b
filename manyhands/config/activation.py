"""The activations of feed-forward networks: one row each, read by configs, kernels, planner and families.

The maths is in `kernels/experts.py`. `check/oracle.py` keeps a copy of these facts on purpose, and the kernels' codes
stand in native/manyhands.h: a test compares them.
"""

import math
from typing import Literal, NamedTuple

Activation = Literal["swiglu", "swiglu_oai", "geglu", "geglu_tanh", "gelu", "relu"]
"""swiglu_oai is gpt-oss's: clamped, with a steeper sigmoid; geglu_tanh uses the tanh form of GELU (Grok-1)."""


class Form(NamedTuple):
    """What a network with this activation consists of, and its constants."""

    gated: bool
    """The activation of a gate times a second projection up."""
    alpha: float = 1.0
    """The gain of the gate's sigmoid."""
    limit: float = math.inf
    """Where gate (from above) and up (from both sides) are clamped."""

    @property
    def matrices(self) -> int:
        """Of one feed-forward network: gate, up and down, or up and down."""
        return 3 if self.gated else 2


ACTIVATIONS: dict[Activation, Form] = {
    "swiglu": Form(gated=True),
    "swiglu_oai": Form(gated=True, alpha=1.702, limit=7.0),  # openai/gpt-oss, torch/model.py
    "geglu": Form(gated=True),
    "geglu_tanh": Form(gated=True),
    "gelu": Form(gated=False),
    "relu": Form(gated=False),
}
GATED: frozenset[str] = frozenset(name for name, form in ACTIVATIONS.items() if form.gated)
