"""A packed model in memory, and the same with its experts in a file."""

import copy
import os
from functools import partial
from pathlib import Path

from manyhands.models import Decoder
from manyhands.moe.stored import StoredExperts
from manyhands.quant.record import PAGE
from manyhands.store.policies import policy
from manyhands.store.store import Store, StoredLayer


def write_records(model: Decoder, path: Path) -> list[StoredLayer]:
    """The experts of every sparse layer, one layer behind the other, from the second page on."""
    layers, offset = [], PAGE
    with open(path, "wb") as file:
        file.write(b"\xff" * PAGE)
        for number, moe in model.sparse_layers().items():
            records, layout = moe.experts.records, moe.experts.layout
            layers.append(StoredLayer(number, path, offset, len(records), layout))
            file.write(records.contiguous().numpy().tobytes())
            offset += records.numel()
    os.utime(path, ns=(1, 1))  # a change is seen whatever the clock's grain
    return layers


def stored_model(
    model: Decoder, path: Path, num_slots: int = 8, num_staged: int = 3, name: str = "lfu", counts=None, **how
) -> tuple[Decoder, Store]:
    """A copy whose experts lie in a file."""
    layers = write_records(model, path)
    store = Store(layers, partial(policy, name, counts=counts), num_slots, num_staged, **how)
    other = copy.deepcopy(model)
    for number, moe in other.sparse_layers().items():
        moe.experts = StoredExperts(store, number)
    return other.eval(), store
