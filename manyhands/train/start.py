"""A start from a checkpoint: its model, its weights, its tokenizer, in the place of new ones."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from manyhands.checkpoint.find import open_checkpoint
from manyhands.checkpoint.manifest import MANIFEST, read_manifest
from manyhands.checkpoint.model import load_model
from manyhands.checkpoint.sidecars import read_tokenizer
from manyhands.config import BuiltConfig, RunConfig, Strict, parse
from manyhands.errors import ConfigError, UserError
from manyhands.families.gguf import is_gguf, read_series
from manyhands.files import CONFIG
from manyhands.models import AnyModel
from manyhands.text import Tokenizer
from manyhands.text.tokenizer_files import has_tokenizer

_STATE = ("optimizer.safetensors", "rng.safetensors")


@dataclass(frozen=True, slots=True)
class Start:
    """A checkpoint whose files were verified, as far as they can be."""

    source: str
    """As `RunConfig.start` has it."""
    path: Path
    """A directory, or a GGUF file."""
    config: BuiltConfig

    @classmethod
    def open(cls, source: str) -> "Start":
        """The checkpoint, run or hub name `source`. Raises `CheckpointError`; `UserError` for packed weights."""
        opened = open_checkpoint(source)
        if opened.records:
            raise UserError(
                f"start = {source!r}: packed weights cannot be trained; "
                f"unpack them first: manyhands convert {source} DIRECTORY"
            )
        return cls(source, opened.path, opened.config)

    def tokenizer(self) -> Tokenizer:
        """Raises `ConfigError` if there is none."""
        if not is_gguf(self.path) and not has_tokenizer(self.path):
            raise ConfigError(f"start = {self.source!r} has no tokenizer: say data.tokenizer=FILE")
        return read_tokenizer(self.path)

    def load_into(self, model: AnyModel) -> None:
        """Give `model` its weights, in float32."""
        weights = load_model(self.path, dtype=torch.float32).state_dict()
        model.load_state_dict(weights)

    def described(self) -> dict[str, str | dict[str, str]]:
        """For the journal: what the run started from, with the SHA-256 of the files that make the model."""
        if (self.path / MANIFEST).is_file():
            digests = {name: entry.sha256 for name, entry in read_manifest(self.path).files.items()}
        else:
            files = [part.path for part in read_series(self.path)[1]] if is_gguf(self.path) else self.path.iterdir()
            digests = {path.name: _digest(path) for path in sorted(files) if _is_model(path.name)}
        of_model = {name: digest for name, digest in digests.items() if _is_model(name)}
        return {"source": self.source, "directory": str(self.path.resolve()), "sha256": of_model}


def with_model(run: RunConfig, config: BuiltConfig) -> RunConfig:
    """`run` with the model that it starts from. Raises `ConfigError` naming a field that says otherwise."""
    if "model" in run.model_fields_set:
        _same(run.model, config, "model", run.start)
    values = {name: getattr(run, name) for name in type(run).model_fields if name != "model"}
    return parse(RunConfig, {**values, "model": config})


def _same(said: Strict, found: Strict, path: str, start: str | None) -> None:
    for name in type(said).model_fields:
        if name not in said.model_fields_set:
            continue
        mine, theirs = getattr(said, name), getattr(found, name, None)
        if mine == theirs:
            continue
        if isinstance(mine, Strict) and isinstance(theirs, Strict):
            _same(mine, theirs, f"{path}.{name}", start)
            continue
        raise ConfigError(
            f"{path}.{name} = {mine!r} contradicts start = {start!r}, whose model has {theirs!r}: "
            "leave the model section away"
        )


def _is_model(name: str) -> bool:
    """Whether a file says what the model is, or holds its weights. A run's checkpoint has its training state beside."""
    return name == CONFIG or (name.endswith((".safetensors", ".gguf")) and name not in _STATE)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
