"""The models of numbers as directories: `config.json` (their description), `model.safetensors`, `manifest.json`."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from manyhands.checkpoint.files import building
from manyhands.checkpoint.manifest import verify
from manyhands.config import HierarchicalExpertsConfig, LocalExpertsConfig, read_model_config
from manyhands.errors import CheckpointError, ConfigError
from manyhands.files import CONFIG
from manyhands.models.hierarchical_experts import HierarchicalExperts
from manyhands.models.local_experts import LocalExperts
from manyhands.strict_json import read_object

_WEIGHTS = "model.safetensors"
_LIMIT = 1 << 20

NumberModel = LocalExperts | HierarchicalExperts


def save_experts(model: NumberModel, path: str | Path, *, overwrite: bool = False) -> None:
    """Write a model of numbers, weights and the scale of its inputs, to a directory that `load_experts` reads.

    Raises `UserError` if something stands there that this program did not write, or without `overwrite` anything.
    """
    with building(path, overwrite=overwrite) as directory:
        values = model.config.model_dump(mode="json")
        (directory / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        state = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
        save_file(state, directory / _WEIGHTS)


def load_experts(path: str | Path) -> NumberModel:
    """The model that `save_experts` wrote there, in the dtype in which it was saved.

    Raises `CheckpointError` for a directory that is damaged or holds something else, naming the file or the tensor.
    """
    directory = Path(path)
    verify(directory)
    values = read_object(directory / CONFIG, _LIMIT, CheckpointError)
    try:
        config = read_model_config(values, str(directory / CONFIG))
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(config, LocalExpertsConfig | HierarchicalExpertsConfig):
        raise CheckpointError(f"{directory}: kind = {config.kind!r} is no model of numbers; use mh.load")
    state = load_file(directory / _WEIGHTS)
    dtype = state["experts"].dtype if "experts" in state else torch.float32
    model = (
        LocalExperts(config, dtype) if isinstance(config, LocalExpertsConfig) else HierarchicalExperts(config, dtype)
    )
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    found = {name: list(value.shape) for name, value in state.items()}
    for name in sorted({*shapes, *found}):
        if shapes.get(name) != found.get(name):
            raise CheckpointError(
                f"{directory / _WEIGHTS}: {name} is {found.get(name, 'missing')}, "
                f"where its {CONFIG} asks for {shapes.get(name, 'no such tensor')}"
            )
    model.load_state_dict(state)
    return model.eval()
