"""The heart: routing, balance, capacity, experts, the layer. Start with `layer.py`, then `router.py`."""

from manyhands.moe.bank import ExpertBank
from manyhands.moe.edit import Edit, Edits, Force, Mask, Replay, Swap
from manyhands.moe.experts import Experts
from manyhands.moe.layer import MoELayer
from manyhands.moe.load import LoadCounter, LoadSummary
from manyhands.moe.objective import balance_objective
from manyhands.moe.router import Router
from manyhands.moe.routing import Routing

__all__ = [
    "Edit",
    "Edits",
    "ExpertBank",
    "Experts",
    "Force",
    "LoadCounter",
    "LoadSummary",
    "Mask",
    "MoELayer",
    "Replay",
    "Router",
    "Routing",
    "Swap",
    "balance_objective",
]
