"""A packed model whose experts stay on disk: everything else is read into memory that belongs to no file.

What is mapped is not bounded: the kernel keeps as much of a file as it likes, and throws out what it likes. So nothing
stays mapped here. Records are not even looked at: where they begin follows from the files' headers.
"""

import logging
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from manyhands.checkpoint.budget import Budget
from manyhands.checkpoint.source import Source
from manyhands.checkpoint.tensors import DTYPES, Stored
from manyhands.errors import CheckpointError, UserError
from manyhands.kernels import BACKENDS
from manyhands.moe.stored import StoredExperts
from manyhands.store.policies import policy
from manyhands.store.store import Store, StoredLayer
from manyhands.system import forget, read_at

_PIECE = 8 << 20
_log = logging.getLogger(__name__)


def open_store(
    source: Source, budget: Budget, cache_policy: str = "lfu", counts: Sequence[Sequence[int]] | None = None
) -> Store:
    """The store of a model's experts. `counts` [sparse layers][E]: how often each was used, for the policy `pinned`.

    Raises `ConfigError` for a policy that there is not, `UserError` where no native kernels can read from it.
    """
    if missing := BACKENDS["native"].missing():
        raise UserError(f"experts on disk need the native kernels, which are not here: {missing}")
    make = partial(policy, cache_policy, counts=counts)
    store = Store(expert_layers(source), make, budget.num_slots, budget.num_staged, num_tokens=budget.num_tokens)
    if warning := budget.warning():
        _log.warning("%s: %s", source.directory, warning)
    return store


def expert_layers(source: Source) -> list[StoredLayer]:
    """Where each layer's experts lie."""
    layers = []
    for record in source.records.values():
        if record.num_experts is not None:
            stored = source.files.stored[record.name]
            number = int(record.module.split(".")[1])
            path = source.files.directory / stored.file
            layers.append(StoredLayer(number, path, stored.start, record.num_experts, record.layout))
    return layers


def hold_stored(model: nn.Module, source: Source, store: Store, implementation: str) -> None:
    """Put banks of the store in the places of the experts."""
    for record in source.records.values():
        if record.num_experts is not None:
            parent, _, leaf = record.module.rpartition(".")
            bank = StoredExperts(store, int(record.module.split(".")[1]), implementation)
            setattr(model.get_submodule(parent), leaf, bank)


def read_tensor(source: Source, stored: Stored) -> Tensor:
    """A tensor as it is stored, in memory of its own; no more than a piece of the file is kept by the kernel.

    Raises `CheckpointError` if it cannot be read.
    """
    path = source.files.directory / stored.file
    out = torch.empty(stored.header.shape, dtype=DTYPES[stored.header.dtype])
    if not stored.size:
        return out
    view = memoryview(out.view(-1).view(torch.uint8).numpy().data)
    try:
        with open(path, "rb", buffering=0) as file:
            done = 0
            while done < stored.size:
                count = read_at(file.fileno(), view[done : done + _PIECE], stored.start + done)
                if count <= 0:
                    raise CheckpointError(f"{path}: ends within a tensor; it was changed")
                forget(file.fileno(), stored.start + done, count)
                done += count
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    return out
