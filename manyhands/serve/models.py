"""The models a server has, by name: loaded when they are first asked for, given back by least recent use.

One lives as long as requests use it; `memory` bounds the weights of all that are loaded.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

from manyhands.errors import ManyhandsError, UserError
from manyhands.families.gguf import is_gguf, read_series
from manyhands.serve.errors import ApiError
from manyhands.serve.served import Served, aside


@dataclass(eq=False)
class Entry:
    """A model that can be had."""

    name: str
    load: Callable[[], Served]
    """Blocks for as long as it takes: to be called aside."""
    num_bytes: int
    """What its weights take, about."""
    served: Served | None = None
    num_users: int = 0
    used: float = 0.0


class Models:
    """All of them. One event loop's."""

    def __init__(self, entries: Iterable[Entry], memory: int | None = None) -> None:
        """`memory` None: none is given back. Raises `UserError` for a model that alone is more."""
        self.entries = {entry.name: entry for entry in entries}
        self.memory = memory
        self.created = int(time.time())
        self.stopping = False
        self.on_load: Callable[[Served], None] = lambda served: None
        self._loading = asyncio.Lock()
        for entry in self.entries.values():
            if memory is not None and entry.num_bytes > memory:
                raise UserError(f"{entry.name}: its weights take {entry.num_bytes} bytes, more than --memory {memory}")

    @property
    def loaded(self) -> list[Served]:
        """Those that are in memory."""
        return [entry.served for entry in self.entries.values() if entry.served is not None]

    def entry(self, name: str | None) -> Entry:
        """The one of this name; without a name the first. Raises `ApiError` 404."""
        found = next(iter(self.entries.values())) if name is None else self.entries.get(name)
        if found is None:
            known = ", ".join(list(self.entries)[:20])
            message = f"there is no model {name[:200]!r} here; there is {known}" if name is not None else ""
            raise ApiError(404, message, param="model", code="model_not_found")
        return found

    @asynccontextmanager
    async def use(self, name: object) -> AsyncGenerator[Served, None]:
        """The model, loaded, for as long as the context lasts. Raises `ApiError` 404, 503, and what loading raises."""
        if name is not None and not isinstance(name, str):
            raise ApiError(400, "model: expected a text", param="model")
        entry = self.entry(name)
        if self.stopping:
            raise ApiError(
                503, "the server is stopping and takes no new requests", "unavailable_error", code="stopping"
            )
        entry.num_users += 1
        try:
            yield entry.served or await self._load(entry)
        finally:
            entry.num_users -= 1
            entry.used = time.monotonic()

    def load_first(self) -> None:
        """Load the first, here and now: what is wrong with it is said before anything is served."""
        entry = self.entry(None)
        entry.served = entry.load()
        self.on_load(entry.served)

    async def _load(self, entry: Entry) -> Served:
        async with self._loading:
            if entry.served is None:
                await self._make_room(entry)
                try:
                    entry.served = await asyncio.get_running_loop().run_in_executor(None, entry.load)
                except ManyhandsError as error:
                    raise ApiError(503, f"{entry.name} cannot be loaded: {error}", "server_error") from None
                self.on_load(entry.served)
            return entry.served

    async def _make_room(self, entry: Entry) -> None:
        if self.memory is None:
            return
        while sum(e.num_bytes for e in self.entries.values() if e.served) + entry.num_bytes > self.memory:
            idle = [e for e in self.entries.values() if e.served is not None and not e.num_users]
            if not idle:
                raise ApiError(503, "the models in memory are in use: try later", "unavailable_error", code="memory")
            await self.give_back(min(idle, key=lambda e: e.used))

    async def give_back(self, entry: Entry) -> None:
        """Forget one that nobody uses."""
        served, entry.served = entry.served, None
        if served is not None:
            await aside(served.service.close, 10.0)

    def close(self) -> None:
        """End all engines."""
        for served in self.loaded:
            served.service.close(0.5)


def weight_bytes(directory: Path) -> int:
    """What a checkpoint's tensors take on the disk; of a GGUF file, decoded to float32 as they are in memory."""
    if is_gguf(directory):
        return 4 * sum(prod(info.shape) for info in read_series(directory)[0].tensors.values())
    return sum(file.stat().st_size for file in directory.rglob("*.safetensors"))
