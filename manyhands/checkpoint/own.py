"""The weights of a model, or of its experts only some: what a process reads of which others hold the rest.

E experts.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from manyhands.checkpoint.assemble import our_tensor
from manyhands.checkpoint.packed import Record
from manyhands.checkpoint.source import Source
from manyhands.config.shapes import tensor_shapes
from manyhands.moe import ExpertBank, Router


def keep_own(model: nn.Module, own: slice) -> None:
    """Leave each bank of `model`, which has no contents yet, `own` of its E experts."""
    for bank in banks(model).values():
        for name, param in list(bank.named_parameters(recurse=False)):
            bank.register_parameter(name, nn.Parameter(param.detach()[own], param.requires_grad))
        for name, buffer in list(bank.named_buffers(recurse=False)):
            bank.register_buffer(name, buffer[own])


def read_state(
    source: Source,
    model: nn.Module,
    records: Mapping[str, Record],
    dtype: torch.dtype | None,
    device: torch.device,
    own: slice | None = None,
    wanted: Callable[[str], bool] = lambda name: True,
) -> dict[str, Tensor]:
    """The `wanted` tensors of `model`, by their names in `state_dict`: records as they are, all else in `dtype` but the
    routers, which are float32; of experts `own`."""
    routers = {name for name, module in model.named_modules() if isinstance(module, Router)}
    stacked = set(banks(model))
    inside = {name for record in records.values() for name in record.sections}
    state: dict[str, Tensor] = {}
    for name in filter(wanted, records):
        record = source.files.tensor(name)
        state[name] = (record if own is None or name.rpartition(".")[0] not in stacked else record[own]).to(device)
    for name, shape in tensor_shapes(source.config).items():
        if name not in inside and wanted(name):
            module = name.rpartition(".")[0]
            kind = torch.float32 if module in routers else dtype
            state[name] = our_tensor(source, name, shape, kind, device, own if module in stacked else None)
    return state


def banks(model: nn.Module) -> dict[str, ExpertBank]:
    """Experts by their names in `model`."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ExpertBank)}
