"""A run as it lies on disk, also one that was killed, of an earlier version, or of which only the journal is left.

A journal may come from anywhere: what is drawn or judged of it is looked at first.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manyhands.config import RunConfig
from manyhands.config.load import load_run
from manyhands.errors import ConfigError, DataError, UserError
from manyhands.files import JOURNAL, RUN
from manyhands.trace.journal import read_journal

_MOST_BYTES = 1 << 30
_NUMBERS = {
    "step": (
        *("loss", "bits_per_byte", "aux_loss", "lr", "grad_norm", "skipped"),
        *("tokens", "tokens_per_s", "elapsed", "wall", "data_wait", "epochs"),
    ),
    "eval": ("valid_loss", "valid_bits_per_byte", "valid_perplexity"),
    "end": ("max_steps", "elapsed", "wall"),
    "start": ("parameters", "active_parameters", "num_experts", "num_experts_per_tok"),
}
_OF_LAYER = ("max_vio", "cv2", "entropy", "dead", "dropped", "top1_weight")


@dataclass(frozen=True, slots=True)
class PastRun:
    """What is left of a run."""

    name: str
    records: Sequence[dict[str, Any]]
    """Of its journal; empty if it was never written."""
    run: RunConfig | None
    """None if its description is not there, or this version cannot read it."""
    problem: str | None
    """Why there is no `run`."""


def read_run(path: str | Path) -> PastRun:
    """The run in a directory, or the one of a journal file.

    Raises `UserError` if there is neither a journal nor a description, `DataError` for a journal that is not one.
    """
    path = Path(path)
    folder, journal = (path, path / JOURNAL) if path.is_dir() else (path.parent, path)
    description = folder / RUN
    if not journal.is_file() and not (path.is_dir() and description.is_file()):
        what = f"holds neither {JOURNAL} nor {RUN}" if path.is_dir() else "does not exist"
        raise UserError(f"{path}: {what}; name a run's directory, or its journal")
    records: list[dict[str, Any]] = []
    if journal.is_file():
        if journal.stat().st_size > _MOST_BYTES:
            raise DataError(
                f"{journal}: {journal.stat().st_size:,} bytes are more than the {_MOST_BYTES:,} it may have"
            )
        records = read_journal(journal)
        for number, record in enumerate(records):
            _check(record, f"{journal}, record {number + 1} ({record['kind']} at step {record['step']})")
    if not description.is_file():
        return PastRun(folder.resolve().name, records, None, f"there is no {RUN} beside the journal")
    try:
        return PastRun(folder.resolve().name, records, load_run(description), None)
    except ConfigError as error:
        return PastRun(folder.resolve().name, records, None, f"this version cannot read {RUN}: {error}")


def _check(record: Mapping[str, Any], where: str) -> None:
    """Raise `DataError` naming the field of a record that is not what the journal's format has there."""
    for name in _NUMBERS.get(record["kind"], ()):
        if not _number(record.get(name)):
            raise DataError(f"{where}: {name} = {str(record[name])[:40]!r} is not a number")
    for name in ("data", "machine") if record["kind"] == "start" else ():
        if not isinstance(record.get(name, {}), dict):
            raise DataError(f"{where}: {name} is not a set of fields")
    if record["kind"] == "start":
        told = record.get("data", {})
        for name in ("train_tokens", "unigram"):
            if not _number(told.get(name)):
                raise DataError(f"{where}: data.{name} is not a number")
    if record["kind"] != "step":
        return
    layers = record.get("moe") or {}
    if not isinstance(layers, dict) or not all(layer.isdigit() for layer in layers):
        raise DataError(f"{where}: moe is not a set of layers by number")
    for layer, figures in layers.items():
        load = figures.get("load") if isinstance(figures, dict) else None
        if not isinstance(load, list) or not load or not all(map(_counted, load)):
            raise DataError(f"{where}: moe.{layer}.load is not a list of shares")
        if wrong := next((name for name in _OF_LAYER if not _number(figures.get(name))), None):
            raise DataError(f"{where}: moe.{layer}.{wrong} is not a number")


def _number(value: Any) -> bool:
    return value is None or isinstance(value, (int, float))


def _counted(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
