"""Checkpoints: writes that are complete or did not happen, state without pickle, run directories."""

from manyhands.checkpoint.files import building, remove
from manyhands.checkpoint.manifest import verify
from manyhands.checkpoint.runs import RunDirectory, resolve_checkpoint
from manyhands.checkpoint.state import (
    flatten,
    load_tensors,
    rng_state,
    save_tensors,
    set_rng_state,
    unflatten,
)

__all__ = [
    "RunDirectory",
    "building",
    "flatten",
    "load_tensors",
    "remove",
    "resolve_checkpoint",
    "rng_state",
    "save_tensors",
    "set_rng_state",
    "unflatten",
    "verify",
]
