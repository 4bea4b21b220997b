"""A model that is being tuned: what `RunConfig.tune` freezes, trains and puts in; what of it a checkpoint holds.

`full` changes nothing here: which of its own weights are trained is `trainable`'s to say.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from manyhands.config.tune import EsftTuning, LoraTuning, MoloraTuning, MovTuning, PerftTuning, TuneConfig
from manyhands.errors import CheckpointError, ConfigError
from manyhands.models.adapted import adapt as put_lora
from manyhands.models.build import AnyModel, build
from manyhands.models.mixed import mix
from manyhands.moe import Experts, MoELayer
from manyhands.moe.chosen import ChosenExperts


def adapt(
    model: AnyModel, how: TuneConfig, seed: int = 0, *, state: Mapping[str, Tensor] | None = None, where: str = ""
) -> None:
    """Freeze `model` and put into it what `how` trains, in place; on any device, `meta` too.

    What is new begins so that nothing is changed yet, and is drawn with `seed`. What is trained is float32. Raises
    `ConfigError` for a model that cannot be tuned so.

    `state`, from the file `where`, is what will be loaded: whether it fits is seen first, without memory, which a
    hostile description may ask too much of. Raises `CheckpointError`.
    """
    if state is not None:
        with torch.device("meta"):
            probe = build(model.config)
        adapt(probe, how)
        check_trained(trained_state(probe), state, where)
    model.requires_grad_(False)
    if isinstance(how, EsftTuning):
        _choose(model, how)
    elif isinstance(how, LoraTuning):
        put_lora(model, how, seed)
    elif isinstance(how, MoloraTuning | MovTuning | PerftTuning):
        mix(model, how, seed)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()


def _choose(model: AnyModel, how: EsftTuning) -> None:
    """The chosen experts' weights, and beside them what else is to be trained."""
    if how.experts is None:
        raise ConfigError("tune.experts: which they are is not said; a run chooses them from its data when it begins")
    layers = model.sparse_layers()
    check_chosen(how.experts, {layer: moe.router.config.num_experts for layer, moe in layers.items()})
    if how.non_expert_modules:
        model.requires_grad_(True)
    for layer, moe in layers.items():
        if not isinstance(moe.experts, Experts):
            raise ConfigError(f"tune.method = 'esft': layer {layer} holds packed experts, which cannot be trained")
        moe.experts.requires_grad_(False)
        if moe.shared_experts is not None:
            moe.shared_experts.requires_grad_(how.shared_experts)
        if ids := how.experts.get(layer, ()):
            moe.experts = ChosenExperts(moe.experts, ids)


def check_chosen(chosen: Mapping[int, tuple[int, ...]], there: Mapping[int, int]) -> None:
    """That experts are in the model, `there` (layer -> how many it has). Raises `ConfigError` naming the first that is
    not, and where none is chosen."""
    if not there:
        raise ConfigError("tune.method = 'esft' trains some of the experts, and this model has none")
    for layer, ids in chosen.items():
        if layer not in there:
            raise ConfigError(f"tune.experts: layer {layer} is not sparse; those that are: {sorted(there)}")
        if wrong := [e for e in ids if e >= there[layer]]:
            raise ConfigError(f"tune.experts: layer {layer} has no expert {wrong[0]}; it has {there[layer]}")
        if len(set(ids)) < len(ids):
            raise ConfigError(f"tune.experts: layer {layer} names an expert twice: {list(ids)}")
    if not any(chosen.values()):
        raise ConfigError("tune.experts: no layer has an expert to train")


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """By name what training changes: the parameters that have gradients, and the buffers beside them (a trained
    router's selection bias) and of mixtures (Default MoE's averages)."""
    found: dict[str, Tensor] = {}
    kept = model.state_dict(keep_vars=True)
    for prefix, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if not any(p.requires_grad for p in own.values()) and not isinstance(module, MoELayer):
            continue
        buffers = dict(module.named_buffers(recurse=False))
        for name, tensor in [*own.items(), *buffers.items()]:
            whole = f"{prefix}.{name}" if prefix else name
            if whole in kept and (tensor.requires_grad or name in buffers):
                found[whole] = tensor.detach()
    return found


def check_trained(own: Mapping[str, Tensor], state: Mapping[str, Tensor], where: str) -> None:
    """That `state` is what `trained_state` gives of a model where it gives `own`, but for the numbers. Raises
    `CheckpointError`."""
    for name in [name for name in (*own, *state) if (name in own) != (name in state)]:
        raise CheckpointError(f"{where}: {name} {'is missing' if name in own else 'has no place in this model'}")
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise CheckpointError(f"{where}: {name} is {list(tensor.shape)}; the model has {list(own[name].shape)}")


@torch.no_grad()
def load_trained(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Give `model`, adapted, what `trained_state` gave. Raises `CheckpointError`, before anything is changed."""
    own = trained_state(model)
    check_trained(own, state, where)
    for name, tensor in state.items():
        own[name].copy_(tensor)


def settle(model: AnyModel) -> None:
    """Put back into the model what can be put back exactly, so that it computes as any other: chosen experts."""
    for moe in model.sparse_layers().values():
        if isinstance(moe.experts, ChosenExperts):
            moe.experts = moe.experts.put_back()
