"""A checkpoint that holds only what tuning trains, and says of which model.

tuned.json          how it is tuned (`RunConfig.tune`), and the base: where it was, the SHA-256 of its files
tuned.safetensors   what is trained, by our names (`models/tuned.py`)
tokenizer.json …    of a run that learnt from rows: the tokenizer, with the chat template that they were put through

The base is never copied. It is looked for where it was, and must be the same to the last byte.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from manyhands import strict_json
from manyhands.checkpoint.find import find
from manyhands.checkpoint.hub import is_hub_name
from manyhands.checkpoint.identity import model_digests
from manyhands.checkpoint.state import load_tensors, save_whole
from manyhands.checkpoint.whole import Whole
from manyhands.config import Strict, parse
from manyhands.config.tune import TuneConfig
from manyhands.errors import CheckpointError, ConfigError, UserError
from manyhands.files import TUNED, TUNED_WEIGHTS
from manyhands.models import AnyModel
from manyhands.models.tuned import adapt, load_trained, settle
from manyhands.text.tokenizer_files import has_tokenizer

_LIMIT = 16 << 20  # bytes of tuned.json: the names of experts in 1,000 layers
_Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Base(Strict):
    """The model that was tuned."""

    source: str
    """As it was named."""
    directory: str
    """Where that was: a directory, or a GGUF file."""
    sha256: dict[str, _Hash]
    """Of each file that makes the model."""

    def check(self, path: Path, whose: str) -> None:
        """That `path` holds this very model. Raises `CheckpointError` naming the file that differs."""
        found = model_digests(path)
        for name in sorted(self.sha256.keys() | found.keys()):
            if found.get(name) != self.sha256.get(name):
                how = "is missing" if name not in found else "was not there" if name not in self.sha256 else "differs"
                raise CheckpointError(f"{whose} tunes {self.source}, and {path} is another model: its {name} {how}")


class Tuned(Strict):
    """What `tuned.json` says."""

    format: Literal["manyhands tuned"] = "manyhands tuned"
    version: Literal[1] = 1
    tune: Annotated[TuneConfig, Field(discriminator="method")]
    base: Base


def write_tuned(directory: Path, tuned: Tuned, trained: Whole) -> None:
    """Into an existing directory; use it inside `building`. `trained` is the model's `trained_state`.

    Raises `StorageError` if the disk refuses.
    """
    (directory / TUNED).write_text(tuned.model_dump_json(indent=1) + "\n", encoding="utf-8")
    save_whole(directory / TUNED_WEIGHTS, trained)


@dataclass(frozen=True, slots=True)
class Change:
    """An opened checkpoint of this kind."""

    directory: Path
    tuned: Tuned
    base: Path
    """The model that was tuned, verified: a directory, or a GGUF file."""

    @classmethod
    def at(cls, directory: Path, base: Path | None = None) -> "Change | None":
        """Of a verified directory; None: it holds no tuning, but a model. `base` is where the base lies (None: where it
        was).

        Raises `CheckpointError` if it is damaged, or its base is not where it was, or is another one.
        """
        path = directory / TUNED
        if not path.is_file():
            return None
        values = strict_json.read_object(path, _LIMIT, CheckpointError)
        try:
            tuned = parse(Tuned, values, str(path))
        except ConfigError as error:
            raise CheckpointError(str(error)) from None
        if base is None:
            base = _find(directory, tuned.base)
        else:
            tuned.base.check(base, str(directory))
        return cls(directory, tuned, base)

    @property
    def tokenizer(self) -> Path:
        """Where the tokenizer is: with what was tuned, if that has a chat template of its own, else with the base."""
        return self.directory if has_tokenizer(self.directory) else self.base

    def put_into(self, model: AnyModel, *, shared: bool = False) -> None:
        """Make of the base the model that this holds. Raises `CheckpointError` if that does not fit.

        `shared`: others compute with the base's weights, so none of them is changed. Raises `UserError` for a tuning
        that changes some in place.
        """
        own = {id(tensor) for tensor in [*model.parameters(), *model.buffers()]}
        where = self.directory / TUNED_WEIGHTS
        state = load_tensors(where)
        try:
            adapt(model, self.tuned.tune, state=state, where=str(where))
        except ConfigError as error:
            raise CheckpointError(f"{self.directory / TUNED}: {error}") from None
        moves = model.config.moe is not None and model.config.moe.unchosen == "average"
        if shared and (moves or any(id(p) in own and p.requires_grad for p in model.parameters())):
            raise UserError(
                f"{self.directory} changes weights of the base itself, which others compute with here: make a whole "
                "model of it (manyhands convert)"
            )
        load_trained(model, state, str(where))
        if not shared:
            settle(model)


def _find(directory: Path, base: Base) -> Path:
    for place in dict.fromkeys((base.directory, base.source)):
        if Path(place).exists() or (place == base.source and is_hub_name(place)):
            path = find(place)
            base.check(path, str(directory))
            return path
    raise CheckpointError(
        f"{directory} holds what tuning changed of {base.source}, which is no longer at {base.directory}"
    )


def described(base: Mapping[str, object]) -> Base:
    """From what `Start.described` says."""
    return parse(Base, base)
