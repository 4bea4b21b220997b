"""The model in a checkpoint directory: what it is, its weights, its tokenizer.

    config.json         {"model_type": "manyhands", "version": 1, "model": {…ModelConfig…}}
    model.safetensors   parameters and buffers under their `state_dict` names; a tied head is not stored twice
    tokenizer.json      the tokenizer it was trained with, if it has one

The directory's manifest answers for all three.
"""

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from manyhands.checkpoint.files import Manifest, read_manifest, verify
from manyhands.checkpoint.runs import resolve_checkpoint
from manyhands.config import ModelConfig, Strict, parse
from manyhands.errors import CheckpointError, ConfigError
from manyhands.files import cannot_write
from manyhands.moe import Router
from manyhands.nn import Decoder
from manyhands.text import Tokenizer

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
TOKENIZER = "tokenizer.json"
_CONFIG_LIMIT = 1 << 20
_FLOATS = ("F64", "F32", "F16", "BF16")


class Description(Strict):
    """`config.json`."""

    model_type: Literal["manyhands"] = "manyhands"
    version: Literal[1] = 1
    model: ModelConfig


def save_model(directory: str | Path, model: Decoder, tokenizer_path: str | Path | None = None) -> None:
    """Write the three files into an existing directory; use it inside `building`, which makes them a checkpoint.

    Raises `StorageError` if the disk refuses.
    """
    directory = Path(directory)
    description = Description(model=model.config).model_dump(mode="json")
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    try:
        (directory / CONFIG).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
        if tokenizer_path is not None:
            shutil.copyfile(tokenizer_path, directory / TOKENIZER)
    except (OSError, SafetensorError) as error:
        raise cannot_write(directory, error) from error


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    experts_implementation: str = "auto",
) -> tuple[Decoder, Tokenizer]:
    """Model and tokenizer of a checkpoint directory, or of the newest valid checkpoint of a run directory.

    The other arguments are `load_model`'s. Raises `CheckpointError` naming what is missing or damaged; a model
    without a tokenizer can be had through `load_model`.
    """
    directory = resolve_checkpoint(path)  # verifies every byte
    manifest = read_manifest(directory)
    tokenizer = Tokenizer.from_file(_listed(directory, manifest, TOKENIZER))
    model = _load(directory, manifest, dtype, device, experts_implementation)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise CheckpointError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} tokens, the model vocab_size = "
            f"{model.config.vocab_size}; they do not belong together"
        )
    return model, tokenizer


def load_model(
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    experts_implementation: str = "auto",
) -> Decoder:
    """The model of a checkpoint directory, in evaluation mode; `model.train()` to go on training it.

    On the CPU its weights are the file itself, mapped into memory and private to this process: nothing is read
    until it is used, and a change is never written back. `dtype` converts the weights (None: as stored), except the
    routers', which stay float32. NaN and infinite weights are loaded as they are.

    Raises `CheckpointError` if the directory is damaged, or holds a config or a tensor that does not fit; all names,
    shapes and dtypes are checked before any weight is allocated.
    """
    directory = Path(directory)
    return _load(directory, verify(directory), dtype, device, experts_implementation)


def _load(
    directory: Path, manifest: Manifest, dtype: torch.dtype | None, device: torch.device | str, implementation: str
) -> Decoder:
    config = read_config(_listed(directory, manifest, CONFIG))
    path = _listed(directory, manifest, WEIGHTS)
    try:
        with torch.device("meta"):
            model = Decoder(config, implementation)
    except RuntimeError as error:  # sizes that are fine one by one, with a product over 2⁶³
        raise CheckpointError(f"{directory / CONFIG}: no such model can be built: {str(error)[:120]}") from None
    routers = [name for name, module in model.named_modules() if isinstance(module, Router)]
    expected = model.state_dict()
    float32 = {name for name in expected if name.rpartition(".")[0] in routers}
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            _check(path, file, expected, float32)
            state = {name: _read(file, name, None if name in float32 else dtype) for name in expected}
    except (OSError, SafetensorError, TypeError, ValueError) as error:  # TypeError: a dimension over 2⁶³
        raise CheckpointError(f"{path}: not a readable safetensors file: {str(error).splitlines()[0]}") from error
    model.load_state_dict(state, assign=True)
    return model.eval()


def _listed(directory: Path, manifest: Manifest, name: str) -> Path:
    """A file that the manifest answers for; one that merely lies there was verified by nobody."""
    if name not in manifest.files:
        raise CheckpointError(f"{directory}: its manifest lists no {name!r}; there is no model to load from it")
    return directory / name


def read_config(path: Path) -> ModelConfig:
    """The model that a checkpoint's `config.json` describes. Raises `CheckpointError` naming what is wrong in it."""
    try:
        if path.stat().st_size > _CONFIG_LIMIT:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes is too long for a model description")
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: not valid JSON") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected an object, found {type(values).__name__}")
    try:
        return parse(Description, values, str(path)).model
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def _check(path: Path, file: Any, expected: dict[str, Tensor], float32: set[str]) -> None:
    """Hold the file's header against the model, before anything is allocated."""
    stored = set(file.keys())
    if missing := expected.keys() - stored:
        raise CheckpointError(f"{path}: tensor {min(missing)!r} is missing{_more(missing)}")
    if unknown := stored - expected.keys():
        raise CheckpointError(f"{path}: tensor {min(unknown)!r} is not one of this model's{_more(unknown)}")
    for name, tensor in expected.items():
        header = file.get_slice(name)
        shape, dtype = header.get_shape(), header.get_dtype()
        if shape != list(tensor.shape):
            raise CheckpointError(f"{path}: tensor {name!r} has shape {shape}, {CONFIG} says {list(tensor.shape)}")
        allowed = ("F32",) if name in float32 else _FLOATS
        if dtype not in allowed:
            raise CheckpointError(f"{path}: tensor {name!r} is {dtype}; expected {' or '.join(allowed)}")


def _more(names: set[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _read(file: Any, name: str, dtype: torch.dtype | None) -> Tensor:
    tensor: Tensor = file.get_tensor(name)
    return tensor if dtype is None else tensor.to(dtype)
