"""Adapters that a router mixes, put into a model: MoLoRA and MoV beside linear layers, PERFT beside experts."""

import torch
from torch import nn

from manyhands.config.tune import MoloraTuning, MovTuning, PerftTuning
from manyhands.errors import ConfigError
from manyhands.layers.linear import Linear
from manyhands.layers.packed_linear import RecordLinear
from manyhands.models.adapted import chosen_parts, parts_of
from manyhands.models.build import AnyModel
from manyhands.moe.mixed import ExpertsBeside, LowRankMixture, MixedLinear, VectorMixture


def mix(model: AnyModel, how: MoloraTuning | MovTuning | PerftTuning, seed: int) -> None:
    """Put fresh adapters into `model`, frozen, so that nothing is changed yet.

    Raises `ConfigError`, before anything is changed, for targets that name nothing, and for a model without what they
    stand beside.
    """
    if isinstance(how, PerftTuning):
        made = _beside_experts(model, how)
    else:
        made = _beside_layers(model, how)
    for adapters in made:
        adapters.requires_grad_(True)
    device = next(model.parameters()).device
    if device.type == "meta":
        return
    generator = torch.Generator(device=device).manual_seed(seed)
    for adapters in made:
        adapters.reset_parameters(generator)


def _beside_layers(model: nn.Module, how: MoloraTuning | MovTuning) -> list[LowRankMixture | VectorMixture]:
    parts = chosen_parts(parts_of(model), how.targets)
    if routed := [part.name for part in parts if part.group == "routed"]:
        raise ConfigError(
            f"tune.targets: {routed[0]} is a stack of experts, a mixture already: "
            f"{how.method} is for linear layers; lora and perft are for experts"
        )
    made: list[LowRankMixture | VectorMixture] = []
    for part in parts:
        layer = model.get_submodule(part.name)
        assert isinstance(layer, Linear | RecordLinear)
        outputs, inputs = part.shape
        device = next(iter([*layer.parameters(), *layer.buffers()])).device
        shared = how.num_experts, how.top_k, inputs, outputs
        if isinstance(how, MoloraTuning):
            adapters: LowRankMixture | VectorMixture = LowRankMixture(*shared, how.r, how.alpha, device)
        else:
            adapters = VectorMixture(*shared, device)
        made.append(adapters)
        parent, _, leaf = part.name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, MixedLinear(layer, adapters))
    return made


def _beside_experts(model: AnyModel, how: PerftTuning) -> list[LowRankMixture | VectorMixture]:
    layers = model.sparse_layers()
    if not layers:
        raise ConfigError("tune.method = 'perft' puts experts beside a mixture, and this model has none: take molora")
    made: list[LowRankMixture | VectorMixture] = []
    for layer, moe in layers.items():
        if moe.router.config.select == "soft" or moe.unchosen != "nothing":
            raise ConfigError(f"tune.method = 'perft': layer {layer} needs each expert's output, and perft has none")
        D = moe.experts.hidden_size
        adapters = LowRankMixture(how.num_experts, how.top_k, D, D, how.r, how.alpha, moe.router.weight.device)
        made.append(adapters)
        moe.experts = ExpertsBeside(moe.experts, adapters)
    return made
