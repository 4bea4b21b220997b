"""Tensors of which each process holds some rows, as whole ones in files: nothing there says how they lay.

Rank 0 writes. It asks for a tensor by name when its turn comes, and all ranks bring their rows: no more than one whole
tensor is in memory beside what a process holds. To read, each takes its own rows of the file.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from manyhands.errors import CheckpointError, EndedElsewhere, exit_code_of
from manyhands.parallel.ranks import Ranks
from manyhands.parallel.shards import Rows, held_rows, local, whole


class Whole(Mapping[str, Tensor]):
    """Tensors as rank 0 reads them while the others follow: each whole."""

    def __init__(self, tensors: Mapping[str, Tensor], ranks: Ranks, prefix: str = "") -> None:
        """Of `tensors` those whose names begin with `prefix`, without it."""
        self.parts = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        self._ranks, self._prefix = ranks, prefix

    def under(self, prefix: str) -> "Whole":
        """Those whose names begin with `prefix`, without it."""
        return Whole(self.parts, self._ranks, prefix)

    def __getitem__(self, name: str) -> Tensor:
        if isinstance(self.parts[name], DTensor):
            self._ranks.tell({"bring": self._prefix + name})
        return whole(self.parts[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)


def written_together(tensors: Mapping[str, Tensor], ranks: Ranks, write: Callable[[Whole], None]) -> None:
    """Rank 0 does `write` with the whole of `tensors`, of which every rank gives its own under the same names.

    What `write` raises is raised on rank 0; the others end at once, by `EndedElsewhere`.
    """
    if ranks.rank:
        while "bring" in (said := ranks.tell(None)):
            whole(tensors[said["bring"]])
        if "failed" in said:
            raise EndedElsewhere(said["failed"])
        return
    try:
        write(Whole(tensors, ranks))
    except BaseException as error:
        with suppress(Exception):  # those that are no longer there need not be told
            ranks.tell({"failed": exit_code_of(error)})
        raise
    ranks.tell({})


class TensorReader:
    """Rows of the tensors of some safetensors files. Raises `CheckpointError` naming the file that cannot be read."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files: dict[str, tuple[Path, Any]] = {}
        for path in files:
            if not path.is_file():
                raise CheckpointError(f"{path}: no such file")
            try:
                opened: Any = safe_open(path, framework="pt")
                self._files |= dict.fromkeys(opened.keys(), (path, opened))
            except (OSError, SafetensorError, TypeError, ValueError) as error:  # TypeError: a dimension over 2⁶³
                raise _unreadable(path, error) from error

    def metadata(self, key: str) -> str:
        """What the header of the first file says of `key`; empty if nothing."""
        _, file = next(iter(self._files.values()))
        return str((file.metadata() or {}).get(key, ""))

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Of every tensor, by name."""
        return {name: torch.Size(file.get_slice(name).get_shape()) for name, (_, file) in self._files.items()}

    def __call__(self, name: str, rows: Rows = None) -> Tensor:
        """A tensor, or some of its rows."""
        path, file = self._files[name]
        try:
            if rows is None:
                found: Tensor = file.get_tensor(name)
                return found
            part = file.get_slice(name)
            if rows.start < rows.stop:
                found = part[rows]
                return found
            return torch.empty(0, *part.get_shape()[1:])
        except (OSError, SafetensorError, ValueError) as error:
            raise _unreadable(path, error) from error


@torch.no_grad()
def fill(tensors: Mapping[str, Tensor], read: TensorReader, what: str) -> None:
    """Give every one of `tensors` what the files hold under its name, each process its own rows.

    Raises `CheckpointError`, before anything is changed, where names or shapes differ; `what` begins it.
    """
    shapes = read.shapes
    for name in sorted(shapes.keys() ^ tensors.keys())[:1]:
        raise CheckpointError(f"{what}: {name} {'is missing' if name in tensors else 'has no place in this model'}")
    for name, tensor in tensors.items():
        if shapes[name] != tensor.shape:
            raise CheckpointError(f"{what}: {name} is {list(shapes[name])}; the model has {list(tensor.shape)}")
    for name, tensor in tensors.items():
        local(tensor).copy_(read(name, held_rows(tensor)))


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path}: not a readable safetensors file: {str(error).splitlines()[0]}")
