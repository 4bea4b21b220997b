"""LoRA on a whole model: put it there, merge it, take it away, and its tensors by name.

adapt(model, LoraConfig(r=16, targets=("attention", "routed")))    # everything else is frozen
merge(model)                                                       # W + s·B·A, rounded once; the adapters are gone

A part is a matrix that can have LoRA, called as the model calls it: `layers.3.self_attn.q_proj`,
`layers.3.mlp.experts.gate_up_proj`. Its tensors are `{part}.lora_A` and `{part}.lora_B`.
"""

import copy
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from manyhands.config.adapter import TARGET_GROUPS, LoraConfig
from manyhands.errors import ConfigError
from manyhands.layers.adapted import AdaptedLinear, LowRank, base_name
from manyhands.layers.linear import Linear
from manyhands.layers.packed_linear import RecordLinear
from manyhands.moe.adapted import AdaptedExperts, shapes_of
from manyhands.moe.bank import ExpertBank


@dataclass(frozen=True, slots=True)
class Part:
    """A matrix that can have LoRA."""

    name: str
    group: str
    """Of `TARGET_GROUPS`."""
    shape: tuple[int, ...]
    """[out, in], or [E, out, in]."""


def parts_of(model: nn.Module) -> dict[str, Part]:
    """Every matrix of `model` that can have LoRA, adapted or not, in the model's order.

    Projections of attention and feed-forward networks, and routed experts. Not routers, norms, embeddings, the head, or
    the gate of shared experts.
    """
    found: dict[str, Part] = {}
    for path, module in model.named_modules():
        name = base_name(path)
        if isinstance(module, Linear | RecordLinear) and "_proj" in name.rpartition(".")[2]:
            outputs, inputs = _linear_shape(module)
            found[name] = Part(name, _group(name), (outputs, inputs))
        elif isinstance(module, ExpertBank) and not isinstance(module, AdaptedExperts):
            for matrix, shape in shapes_of(module)[0].items():
                found[f"{name}.{matrix}"] = Part(f"{name}.{matrix}", "routed", shape)
    return found


def _linear_shape(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, RecordLinear):
        (matrix,) = layer.layout.matrices
        return matrix.outputs, matrix.inputs
    assert isinstance(layer, Linear)
    return layer.out_features, layer.in_features


def _group(name: str) -> str:
    parts = name.split(".")
    if "shared_experts" in parts:
        return "shared"
    return "attention" if any(part.endswith("_attn") for part in parts) else "dense"


def chosen_parts(parts: Mapping[str, Part], targets: Iterable[str]) -> list[Part]:
    """Those that `targets` name, in the model's order; a group that the model lacks is passed over.

    Raises `ConfigError` for a name that is not there, and where nothing is left.
    """
    wanted: set[str] = set()
    targets = list(targets)
    for target in targets:
        if target in TARGET_GROUPS:
            wanted |= {name for name, part in parts.items() if part.group == target}
            continue
        matched = {name for name in parts if name == target or name.endswith(f".{target}")}
        if not matched:
            raise _no_target(target, parts)
        wanted |= matched
    if not wanted:
        raise _no_target(", ".join(targets), parts)
    return [part for name, part in parts.items() if name in wanted]


def _no_target(target: str, parts: Mapping[str, Part]) -> ConfigError:
    there = sorted({part.group for part in parts.values()} | {name.rpartition(".")[2] for name in parts})
    near = difflib.get_close_matches(target, there, n=3, cutoff=0.5) or there
    return ConfigError(f"targets: {target!r} names no matrix of this model that can have LoRA; there are {near}")


def adapt(model: nn.Module, config: LoraConfig, seed: int = 0) -> None:
    """Freeze `model` and put fresh LoRA beside the matrices that `config.targets` name: B is 0, so nothing changes yet.

    The same seed gives the same A, whatever the global generator.

    Raises `ConfigError`, before anything is changed: a target that names nothing, dropout with routed experts, experts
    on disk, a model that has adapters already.
    """
    refuse_adapted(model, "adapt")
    parts = chosen_parts(parts_of(model), config.targets)
    if config.dropout and any(part.group == "routed" for part in parts):
        raise ConfigError(
            f"dropout = {config.dropout:g}: routed experts have none; leave them out of targets, or use 0"
        )
    put(model, {part.name: (config.r, config.scale) for part in parts}, config.dropout)
    device = next(model.parameters()).device
    if device.type == "meta":
        return
    generator = torch.Generator(device=device).manual_seed(seed)
    for low in low_ranks(model).values():
        low.reset_parameters(generator)


def put(model: nn.Module, ranks: Mapping[str, tuple[int, float]], dropout: float = 0.0) -> None:
    """Freeze `model` and wrap what `ranks` names: part -> (r, s). `parts_of` has the names."""
    banks: dict[str, dict[str, tuple[int, float]]] = {}
    wrappers: dict[str, nn.Module] = {}
    for name, (r, scale) in ranks.items():
        module = _module(model, name)
        if module is not None:
            wrappers[name] = AdaptedLinear(module, r, scale, dropout)
        else:
            bank, _, matrix = name.rpartition(".")
            banks.setdefault(bank, {})[matrix] = (r, scale)
    for name, matrices in banks.items():
        experts = model.get_submodule(name)
        assert isinstance(experts, ExpertBank)
        wrappers[name] = AdaptedExperts(experts, matrices)
    model.requires_grad_(False)
    for name, wrapper in wrappers.items():
        _replace(model, name, wrapper)


def _module(model: nn.Module, name: str) -> nn.Module | None:
    """The linear layer of this name; None where it is a matrix of a bank."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def wrappers_of(model: nn.Module) -> dict[str, AdaptedLinear | AdaptedExperts]:
    """What was put into the model, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, AdaptedLinear | AdaptedExperts)}


def is_adapted(model: nn.Module) -> bool:
    """Whether anything in it has LoRA."""
    return bool(wrappers_of(model))


def refuse_adapted(model: nn.Module, what: str) -> None:
    """`ConfigError` for a model with adapters, which `what` would overlook."""
    if is_adapted(model):
        raise ConfigError(f"{what}: the model has LoRA adapters; merge(model) or unload(model) first")


def low_ranks(model: nn.Module) -> dict[str, LowRank]:
    """Every A and B of `model`, by the name of its part."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRank)}


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """`{part}.lora_A` and `{part}.lora_B` -> the tensors themselves: all that training changes."""
    return {
        f"{name}.{leaf}": tensor
        for name, low in low_ranks(model).items()
        for leaf, tensor in (("lora_A", low.lora_A), ("lora_B", low.lora_B))
    }


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Put W + s·B·A, computed in float32 and rounded once, in the place of each adapted W; the adapters are gone.

    Raises `ConfigError`, before anything is changed, for packed weights, which cannot be merged.
    """
    wrappers = wrappers_of(model)
    for name, wrapper in wrappers.items():
        if not list(wrapper.base_layer.parameters()):
            raise ConfigError(f"merge: {name} is packed; `manyhands convert MODEL DST --adapter DIR` unpacks it first")
    for wrapper in wrappers.values():
        lows = {"weight": wrapper} if isinstance(wrapper, AdaptedLinear) else wrapper.low_ranks()
        for name, low in lows.items():
            weight = merged(wrapper.base_layer.get_parameter(name), low.lora_A, low.lora_B, low.scale)
            setattr(wrapper.base_layer, name, nn.Parameter(weight, requires_grad=False))
    unload(model)


def merged(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """W + s·B·A in W's dtype, computed in float32 at least, one expert at a time."""
    out, wide = torch.empty_like(weight), torch.promote_types(weight.dtype, torch.float32)
    for e in range(len(weight)) if weight.dim() == 3 else (slice(None),):
        out[e] = weight[e].to(wide) + scale * (B[e].to(wide) @ A[e].to(wide))
    return out


def unload(model: nn.Module) -> None:
    """Take the adapters away; what they were beside is in its place again, as it was, and frozen."""
    for name, wrapper in wrappers_of(model).items():
        _replace(model, name, wrapper.base_layer)


def sharing(model: nn.Module) -> nn.Module:
    """A second model with the same weights, which lie in memory once: each can have adapters of its own."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
