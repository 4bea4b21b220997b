"""Training state as named tensors and plain JSON, without pickle; every value comes back bit for bit.

`flatten` takes a tree of dicts, lists and tuples apart. JSON has no tuples, no integer keys and no infinity, so the
tree keeps them as one-key objects: `{"tensor": name}`, `{"tuple": [...]}`, `{"dict": [[key, value], ...]}`,
`{"float": "nan"}`. A JSON object in `meta` is always one of these.
"""

import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from manyhands.checkpoint.safetensors.shards import write_file
from manyhands.checkpoint.tensors import NAMES, Header
from manyhands.checkpoint.whole import Whole
from manyhands.errors import CheckpointError
from manyhands.files import cannot_write


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write `tensors` as safetensors; use it inside `building`, it does not flush to the disk.

    Two names for one storage are refused with safetensors' `RuntimeError`: the caller decides which name is saved.
    Raises `StorageError` if the disk refuses.
    """
    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
    except (OSError, SafetensorError) as error:
        raise cannot_write(path, error) from error


def save_whole(path: str | Path, tensors: Whole) -> None:
    """The same file, byte for byte, from tensors that may lie on several processes, one by one."""
    headers = {name: Header(NAMES[part.dtype], tuple(part.shape)) for name, part in tensors.parts.items()}
    try:
        write_file(Path(path), headers, lambda name: tensors[name].detach().cpu())
    except OSError as error:
        raise cannot_write(path, error) from error


def load_tensors(path: str | Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Read a safetensors file. Raises `CheckpointError` naming the file if it is missing, truncated or malformed."""
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        return load_file(path, device=str(device))
    except (OSError, SafetensorError, TypeError, ValueError) as error:  # TypeError: a dimension over 2⁶³
        raise CheckpointError(f"{path}: not a readable safetensors file: {str(error).splitlines()[0]}") from error


def flatten(tree: Any, name: str) -> tuple[dict[str, Tensor], Any]:
    """Tensors of `tree`, named by their path below `name`, and the rest as a JSON value.

    Raises `TypeError` for a leaf that is not a tensor, number, string, boolean or None.
    """
    tensors: dict[str, Tensor] = {}

    def walk(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            assert path not in tensors, f"two tensors are called {path}"
            tensors[path] = value.detach()
            return {"tensor": path}
        if isinstance(value, Mapping):
            return {"dict": [[key, walk(item, f"{path}.{key}")] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            items = [walk(item, f"{path}.{number}") for number, item in enumerate(value)]
            return {"tuple": items} if isinstance(value, tuple) else items
        if isinstance(value, float) and not math.isfinite(value):
            return {"float": str(float(value))}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise TypeError(f"{path}: {type(value).__name__} cannot be saved without pickle")

    return tensors, walk(tree, name)


def unflatten(tensors: Mapping[str, Tensor], meta: Any) -> Any:
    """The tree that `flatten` took apart. Raises `CheckpointError` if `meta` is malformed or a tensor is missing."""
    if isinstance(meta, list):
        return [unflatten(tensors, item) for item in meta]
    if not isinstance(meta, dict):
        return meta
    match meta:
        case {"tensor": str(name), **rest} if not rest:
            if name not in tensors:
                raise CheckpointError(f"tensor {name!r} is missing from the training state")
            return tensors[name]
        case {"tuple": list(items), **rest} if not rest:
            return tuple(unflatten(tensors, item) for item in items)
        case {"dict": list(items), **rest} if not rest and all(_is_pair(item) for item in items):
            return {key: unflatten(tensors, item) for key, item in items}
        case {"float": "nan" | "inf" | "-inf" as text, **rest} if not rest:
            return float(text)
    raise CheckpointError(f"the training state is malformed at {str(meta)[:80]}")


def _is_pair(item: Any) -> bool:
    return isinstance(item, list) and len(item) == 2 and isinstance(item[0], str | int)


def rng_state() -> tuple[dict[str, Tensor], Any]:
    """The state of every global generator: torch's on the CPU and each GPU, Python's, and NumPy's legacy one."""
    version, words, gauss = random.getstate()
    legacy: Any = np.random.get_state(legacy=True)
    algorithm, keys, position, has_gauss, cached = legacy
    tree = {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(index) for index in range(torch.cuda.device_count())],
        "python": [version, torch.tensor(words), gauss],
        "numpy": [algorithm, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
    }
    return flatten(tree, "rng")


def set_rng_state(tensors: Mapping[str, Tensor], meta: Any) -> None:
    """Put every generator where `rng_state` found it. States of GPUs that this machine lacks are left out.

    Raises `CheckpointError` if the state is incomplete or malformed.
    """
    tree = unflatten(tensors, meta)
    try:
        version, words, gauss = tree["python"]
        algorithm, keys, position, has_gauss, cached = tree["numpy"]
        torch.set_rng_state(tree["torch"].cpu())
        for index, state in zip(range(torch.cuda.device_count()), tree["cuda"], strict=False):
            torch.cuda.set_rng_state(state.cpu(), index)
        random.setstate((version, tuple(words.tolist()), gauss))
        np.random.set_state((algorithm, keys.cpu().numpy().astype(np.uint32), position, has_gauss, cached))
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"the state of the random generators is malformed: {error}") from error


def seed_rng(*where: int) -> None:
    """Begin every generator of this process anew, from a place in a run that nothing else is seeded with."""
    words = np.random.SeedSequence([number % (1 << 64) for number in where]).generate_state(3)
    torch.manual_seed(int(words[0]))  # the GPUs' as well
    random.seed(int(words[1]))
    np.random.seed(int(words[2]))
