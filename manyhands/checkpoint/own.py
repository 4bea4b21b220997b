"""The weights of a model, or of its experts only some: what a process reads where others hold the rest.

E experts.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from manyhands.checkpoint.assemble import our_tensor
from manyhands.checkpoint.find import open_found
from manyhands.checkpoint.packed import Record, hold_records
from manyhands.checkpoint.room import check_room
from manyhands.checkpoint.source import Source
from manyhands.config.shapes import tensor_shapes
from manyhands.errors import UserError
from manyhands.models import Decoder
from manyhands.moe import ExpertBank, Router
from manyhands.moe.crew import Crew, Shared


def share_out(source: Source, crew: Crew, implementation: str) -> slice:
    """Tell the others which model it is; the experts of this process, which leads.

    Raises `ConfigError` for another kind than a decoder, and `UserError` for one without experts.
    """
    moe = source.decoder("several processes").moe
    if moe is None:
        raise UserError(f"{source.path}: a dense model has no experts that several processes could share: start one")
    shared = Shared(str(source.path.absolute()), moe.router.num_experts, implementation, list(source.ignored))
    crew.agree(shared)
    return crew.own


def own_experts(crew: Crew) -> dict[int, ExpertBank]:
    """By layer the experts that this process holds of the model that the leader of `crew` loads.

    Returns when all processes have theirs. Raises what `load_model` does.
    """
    shared = crew.agree(None)
    source, device, own = open_found(Path(shared.path), shared.ignored), crew.ranks.device, crew.own
    check_room(source, None, device, own=own, alone=True)
    with torch.device("meta"):
        model = Decoder(source.decoder("several processes"), shared.implementation)
        hold_records(model, source.records, shared.implementation)
    keep_own(model, own)
    inside = tuple(f"{name}." for name in banks(model))
    state = read_state(source, model, source.records, None, device, own, lambda name: name.startswith(inside))
    for prefix, bank in banks(model).items():
        weights = {name.removeprefix(f"{prefix}."): x for name, x in state.items() if name.startswith(f"{prefix}.")}
        bank.load_state_dict(weights, assign=True)
    crew.meet()
    return {layer: moe.experts.requires_grad_(False).eval() for layer, moe in model.sparse_layers().items()}


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
