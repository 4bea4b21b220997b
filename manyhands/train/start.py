"""A start from a checkpoint: its model, its weights, its tokenizer, in the place of new ones."""

from dataclasses import dataclass
from pathlib import Path

import torch

from manyhands.checkpoint.each import each_tensor
from manyhands.checkpoint.find import open_checkpoint, open_found
from manyhands.checkpoint.identity import model_digests
from manyhands.checkpoint.model import load_model
from manyhands.checkpoint.sidecars import read_tokenizer
from manyhands.checkpoint.tuned import Change
from manyhands.config import BuiltConfig, RunConfig, Strict, parse
from manyhands.errors import ConfigError, UserError
from manyhands.families.gguf import is_gguf
from manyhands.models import AnyModel
from manyhands.parallel.shards import is_sharded, put
from manyhands.text import Tokenizer
from manyhands.text.tokenizer_files import has_tokenizer


@dataclass(frozen=True, slots=True)
class Start:
    """A checkpoint whose files were verified, as far as they can be."""

    source: str
    """As `RunConfig.start` has it."""
    path: Path
    """A directory, or a GGUF file."""
    config: BuiltConfig

    @classmethod
    def open(cls, source: str, packed: bool = False) -> "Start":
        """The checkpoint, run or hub name `source`. Raises `CheckpointError`; `UserError` for packed weights, unless
        `packed` says that they stay as they are."""
        opened = open_checkpoint(source)
        if opened.records and not packed:
            raise UserError(
                f"start = {source!r}: packed weights cannot be trained; unpack them first: manyhands convert {source} "
                "DIRECTORY, or put adapters beside them: manyhands tune --method lora"
            )
        return cls(source, opened.path, opened.config)

    @classmethod
    def of_tuned(cls, directory: Path) -> "Start | None":
        """The model that a run's verified checkpoint was tuned from; None for a checkpoint that is a whole model.

        Raises `CheckpointError` if it is no longer there, or is another one.
        """
        change = Change.at(directory)
        return None if change is None else cls(change.tuned.base.source, change.base, open_found(change.base).config)

    def tokenizer(self) -> Tokenizer:
        """Raises `ConfigError` if there is none."""
        if not is_gguf(self.path) and not has_tokenizer(self.path):
            raise ConfigError(f"start = {self.source!r} has no tokenizer: say data.tokenizer=FILE")
        return read_tokenizer(self.path)

    def model(self, implementation: str, dtype: torch.dtype | None, device: torch.device) -> AnyModel:
        """The model as it lies there, mapped where that can be; `dtype` None: as stored."""
        return load_model(self.path, dtype=dtype, device=device, experts_implementation=implementation)

    def load_into(self, model: AnyModel) -> None:
        """Give `model` its weights, in float32; a sharded one reads what lies with it."""
        if any(map(is_sharded, model.parameters())):
            state = model.state_dict()
            for name, value in each_tensor(self.path):
                put(state[name], value)
            return
        weights = load_model(self.path, dtype=torch.float32).state_dict()
        model.load_state_dict(weights)

    def described(self) -> dict[str, str | dict[str, str]]:
        """For the journal: what the run started from, with the SHA-256 of the files that make the model."""
        return {"source": self.source, "directory": str(self.path.resolve()), "sha256": model_digests(self.path)}


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
