"""`adapter_model.safetensors`: A and B in pairs, each checked by its header before anything is read."""

import re
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from manyhands.checkpoint.adapters.fields import Fields, read_fields
from manyhands.checkpoint.adapters.names import PREFIX
from manyhands.checkpoint.safetensors.header import read_header
from manyhands.checkpoint.tensors import FLOATS, Header
from manyhands.errors import CheckpointError

WEIGHTS = "adapter_model.safetensors"
_KEY = re.compile(re.escape(PREFIX) + r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


class AdapterFile:
    """The tensors of one adapter, in pairs."""

    def __init__(self, directory: Path) -> None:
        """Raises `CheckpointError` for tensors that are no matrices of floats, or A or B alone."""
        self.fields: Fields = read_fields(directory)
        self.path = directory / WEIGHTS
        stored, _ = read_header(self.path)
        if not stored:
            raise CheckpointError(f"{self.path}: holds no tensor")
        self.pairs: dict[str, dict[str, str]] = {}
        """Module -> A or B -> the tensor's name."""
        self.headers: dict[str, Header] = {}
        for name, entry in stored.items():
            match = _KEY.fullmatch(name)
            if match is None:
                raise CheckpointError(f"{self.where(name)} is not LoRA's A or B; nothing else is read")
            if len(entry.header.shape) != 2 or entry.header.dtype not in FLOATS or 0 in entry.header.shape:
                found = f"{entry.header.dtype} {list(entry.header.shape)}"
                raise CheckpointError(f"{self.where(name)} is {found}; expected a matrix of floats")
            self.pairs.setdefault(match["module"], {})[match["side"]] = name
            self.headers[name] = entry.header
        for module, pair in self.pairs.items():
            if len(pair) < 2:
                raise CheckpointError(f"{self.path}: {module} has {'A' if 'A' in pair else 'B'} alone")

    def where(self, name: str) -> str:
        """`FILE: tensor 'NAME'`, as errors begin."""
        return f"{self.path}: tensor {name[:160]!r}"

    def shapes(self, module: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of A and B."""
        a, b = (self.headers[self.pairs[module][side]].shape for side in "AB")
        return a, b

    def pair(self, module: str) -> tuple[Tensor, Tensor]:
        """A and B, float32 copies."""
        try:
            a, b = (self._opened.get_tensor(self.pairs[module][side]).float() for side in "AB")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error}") from None
        return a, b

    @cached_property
    def _opened(self) -> Any:
        """Once: of experts one by one there are tens of thousands, and opening reads what all of them are called."""
        return safe_open(self.path, "pt")

    def bad_shapes(self, module: str, expected: str) -> CheckpointError:
        """An error that says what a module's tensors are, and what they should be."""
        a, b = self.shapes(module)
        return CheckpointError(f"{self.path}: {module}: A {list(a)} and B {list(b)}; expected {expected}")
