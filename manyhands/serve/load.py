"""From paths and settings to models that can be served."""

import itertools
import logging
import os
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

from manyhands.checkpoint.about import about
from manyhands.checkpoint.find import find
from manyhands.checkpoint.gguf.files import is_gguf
from manyhands.checkpoint.model import Model, load, only_decoder
from manyhands.checkpoint.put_adapter import put_adapter
from manyhands.checkpoint.sidecars import read_tokenizer
from manyhands.checkpoint.source import open_source
from manyhands.engine.blocks import BLOCK_SIZE
from manyhands.engine.caches import bytes_per_token
from manyhands.engine.engine import Engine
from manyhands.engine.kept_routing import routing_bytes_per_token
from manyhands.engine.recording import recorder_for
from manyhands.engine.service import PATIENCE, Service
from manyhands.errors import CheckpointError, UserError
from manyhands.format import show
from manyhands.models import Decoder
from manyhands.models.adapted import sharing
from manyhands.moe.crew import Crew
from manyhands.plan.host import free_memory, resident_memory
from manyhands.serve.models import Entry, weight_bytes
from manyhands.serve.served import Served
from manyhands.text import Tokenizer
from manyhands.trace.recorder import Recorder
from manyhands.version import __version__

_log = logging.getLogger(__name__)
READING = 600.0
"""Seconds that a step may take whose experts are on disk: a prompt may want all of them."""


@dataclass(frozen=True)
class Settings:
    """How every model is served."""

    max_sequences: int = 32
    max_batch_tokens: int = 256
    max_waiting: int = 128
    kv_bytes: int | None = None
    """None: `cache_bytes` says."""
    request_timeout: float | None = None
    exact: bool = False
    prefix_caching: bool = True
    ignore_fields: Collection[str] = ()
    trace: Path | None = None
    """A directory for the routing of everything that is served."""
    trace_each: bool = False
    """One directory in it for each model, and each time that it is loaded."""
    trace_limit: int | None = None
    memory: int | None = None
    """Bytes of this process with a packed model that does not fit whole: its experts stay on disk."""
    cache_policy: str = "lfu"
    pin: Sequence[Sequence[int]] | None = None
    crew: Crew | None = None
    """Who holds most of the experts of the one model, if others do."""


def entries(
    paths: Mapping[str, str | Path], settings: Settings, adapters: Mapping[str, str | Path] | None = None
) -> list[Entry]:
    """One for each; `adapters` are put on the first model, whose weights are in memory once.

    Each has an engine of its own: requests for different adapters take turns, and share no step and no cache.

    Raises `CheckpointError` for a path where there is no model, `UserError` for adapters of a model that goes.
    """
    if adapters and settings.memory is not None:
        raise UserError("--adapter: adapters compute with their model's weights, which must stay: leave --memory out")
    found: list[Entry] = []
    shared: _Shared | None = None
    for name, path in paths.items():
        directory = find(path)
        size = weight_bytes(Path(directory))
        on_disk = settings.memory is not None and _stays_on_disk(directory, size, settings.memory)
        read = _Shared(partial(_read, directory, settings, on_disk))
        shared = shared or read
        of_this = read if adapters and read is shared else None
        entry = partial(_load, name, of_this.get if of_this else read.load, settings)
        found.append(Entry(name, entry, settings.memory if on_disk and settings.memory else size))
    for name, path in (adapters or {}).items():
        assert shared is not None
        if not Path(path).exists():
            raise CheckpointError(
                f"{path}: does not exist; --adapter takes a run of manyhands tune, or a folder of PEFT's"
            )
        found.append(Entry(name, partial(_load, name, partial(_with_adapter, shared.get, path), settings), 0))
    return found


Read = Callable[[], tuple[Model, Tokenizer]]


class _Shared:
    """A model that is read once, whoever asks first."""

    def __init__(self, load: Read) -> None:
        self.load = load
        self._found: tuple[Model, Tokenizer] | None = None
        self._lock = Lock()

    def get(self) -> tuple[Model, Tokenizer]:
        """Model and tokenizer."""
        with self._lock:
            self._found = self._found or self.load()
            return self._found


def _with_adapter(read: Read, path: str | Path) -> tuple[Model, Tokenizer]:
    base, tokenizer = read()
    model = sharing(base)
    assert isinstance(model, Model) and base.origin is not None
    own = put_adapter(model, base.origin, path, shared=True)
    return model, tokenizer if own is None else read_tokenizer(own)


def _stays_on_disk(directory: Path, size: int, memory: int) -> bool:
    """Whether it is a packed model that does not fit beside what this process has."""
    if size + resident_memory() <= memory or is_gguf(directory):
        return False
    return any(record.num_experts for record in open_source(directory).records.values())


def _read(directory: Path, settings: Settings, on_disk: bool) -> tuple[Model, Tokenizer]:
    how: dict[str, Any] = {}
    if on_disk:
        how = {"memory": settings.memory, "cache_policy": settings.cache_policy, "pin": settings.pin}
        how["cache_bytes"] = settings.kv_bytes
    began = time.monotonic()
    loaded, tokenizer = load(directory, ignore_fields=settings.ignore_fields, crew=settings.crew, **how)
    _log.info("%s: %s; loaded in %s", directory, about(loaded), show(time.monotonic() - began, "s"))
    return only_decoder(loaded, "serve"), tokenizer


def _load(name: str, read: Read, settings: Settings) -> Served:
    model, tokenizer = read()
    recorder = None if settings.trace is None else _recorder(name, model, tokenizer, settings, settings.trace)
    budget = model.budget
    kv_bytes = settings.kv_bytes if budget is None else budget.cache_bytes
    engine = Engine(
        model,
        tokenizer,
        max_sequences=settings.max_sequences,
        # experts on disk are read once a step, for all its rows
        max_batch_tokens=max(settings.max_batch_tokens, 0 if budget is None else budget.num_tokens),
        cache_bytes=kv_bytes or cache_bytes(model, settings.max_sequences),
        prefix_caching=settings.prefix_caching,
        keep_routing=True,
        exact=settings.exact,
        trace=recorder,
    )
    service = Service(
        engine,
        max_waiting=settings.max_waiting,
        patience=PATIENCE if budget is None else READING,
        closing=None if recorder is None else recorder.close,
    )
    service.start()
    return Served(name, service, tokenizer, model.config, settings.request_timeout)


def _recorder(name: str, model: Decoder, tokenizer: Tokenizer, settings: Settings, trace: Path) -> Recorder:
    """Into the directory itself, or, where there are several models, into one by the model's name that is not there."""
    if settings.trace_each:
        own = trace / re.sub(r"[^\w.-]", "_", name).lstrip(".")
        found = (own if not number else own.with_name(f"{own.name}-{number}") for number in itertools.count())
        trace = next(path for path in found if not os.path.lexists(path))
    return recorder_for(model, tokenizer, trace, f"recorded by manyhands serve {__version__}", settings.trace_limit)


def cache_bytes(model: Decoder, max_sequences: int) -> int | None:
    """What the contexts of all requests need that run at a time, but a quarter at most of the memory that is free now.

    None, no bound, on another device, and where the system does not say what is free.
    """
    free = free_memory() if model.embed_tokens.weight.device.type == "cpu" else None
    if free is None:
        return None
    config = model.config
    token = bytes_per_token(config, model.embed_tokens.weight.dtype) + routing_bytes_per_token(config)
    context = -(-config.longest_continued // BLOCK_SIZE) * BLOCK_SIZE
    return max(min(max_sequences * context * token, int(free) // 4), BLOCK_SIZE * token)
