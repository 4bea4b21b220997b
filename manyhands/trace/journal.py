"""The journal of a run: one JSON object per line. Its format is known here alone; writers and readers use this.

Every record has a `kind` and a `step`:

start        a session begins: versions, threads, parameters; command, machine, data (`train/about.py`); `own`: what
             the caller brought
step         loss, balance terms, lr, grad_norm, tokens, epochs, clocks, flops_per_s, mfu (of the machine's measured
             rate; null where it is not known), peak_memory (bytes), skipped, data_wait (share of the step's time spent
             waiting for its batch); `moe`: {layer: figures of its load}
worth        what each expert is worth: bits_per_byte, tokens and texts it was measured on; `layers`: {layer: cost,
             error, share, tokens, size, twin, distance (a list each, by expert), null, shuffled, random_router}, costs
             in bits per byte (`compare/worth.py`, `train/looks.py`)
sample       prompt, text: what the model goes on with
eval         valid_loss, valid_bits_per_byte, valid_perplexity, tokens
change plan  other settings from here on; the steps a time budget gave
early_stop   the best validation, and after how many that were no better the run ends here
checkpoint   where it was saved
end          why the session ended

A line is written with one
system call, so a killed process leaves at most one torn line, at the end. A run that resumes from an older
checkpoint goes back in steps and appends; the reader keeps what was written last.
"""

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from manyhands.errors import DataError, StorageError

Record = dict[str, Any]
R = TypeVar("R", bound=Mapping[str, Any])
LAST_STEPS = 50
"""The window of a run's final figures (MaxVio, dead experts), on the screen and in the report."""


class Tracker(Protocol):
    """Where metrics go besides the journal."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record `metrics` at `step`."""

    def close(self) -> None:
        """Send what is left."""


class Journal:
    """Append records to `path`, and give the numbers of each to `trackers`; closing it closes them.

    A torn last line of a killed run is removed first, so that the next record starts on its own line.
    Raises `StorageError` if the disk refuses a write; the records before it are intact.
    """

    def __init__(self, path: str | Path, trackers: Sequence[Tracker] = ()) -> None:
        self.path = Path(path)
        self._trackers = list(trackers)
        try:
            _end_on_a_whole_line(self.path)
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (closed in `close`)
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be written: {error.strerror}") from None

    def write(self, kind: str, *, step: int, **fields: Any) -> Record:
        """Append one record and return it as it was written.

        NaN and infinity become null. Numbers inside lists (loads) are kept to 6 significant digits, all others
        in full.
        """
        record: Record = {"kind": kind, "step": step, **{name: _plain(value) for name, value in fields.items()}}
        line = json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"
        self._append(line.encode())
        metrics = flatten(record) if self._trackers else {}
        if metrics:
            for tracker in list(self._trackers):
                try:
                    tracker.log(metrics, step)
                except Exception as error:  # a tracker is another program's code: it must not end a run
                    self._trackers.remove(tracker)
                    logging.getLogger(__name__).warning("%s stopped: %s", type(tracker).__name__, error)
        return record

    def close(self) -> None:
        """Close the file and the trackers."""
        self._file.close()
        for tracker in self._trackers:
            tracker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _append(self, line: bytes) -> None:
        before = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(line) != len(line):
                raise OSError(28, "No space left on device")
        except OSError as error:
            os.ftruncate(self._file.fileno(), before)
            raise StorageError(f"{self.path}: the record was not written: {error.strerror}") from None


class Unwritten(Journal):
    """Of a process that leaves the journal to another one: its records are made, and written nowhere."""

    def __init__(self) -> None:
        self._trackers = []

    def close(self) -> None:
        """There is nothing to close."""

    def _append(self, line: bytes) -> None:
        pass


def read_journal(path: str | Path) -> list[Record]:
    """All records of a run in the order of its steps, each (kind, step) as it was written last.

    A step that comes after a later one means that a resumed run went back: what the earlier process had written
    from that step on is left out. A torn last line is left out too.
    Raises `DataError` naming the line for anything else that is not a record.
    """
    try:
        *lines, rest = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    parsed = [_parse(line) for line in lines] + ([last] if (last := _parse(rest)) else [])
    records: dict[tuple[str, int], Record] = {}
    newest = -1
    for number, record in enumerate(parsed, 1):
        if record is None:
            raise DataError(f"{path}, line {number}: not a journal record")
        kind, step = record["kind"], record["step"]
        if kind == "step" and step <= newest:
            records = {key: old for key, old in records.items() if key[0] == "start" or key[1] < step}
        if kind == "step":
            newest = step
        records.pop((kind, step), None)
        records[kind, step] = record
    return list(records.values())


def of_layer(record: Mapping[str, Any], layer: str) -> Mapping[str, Any]:
    """The figures of one sparse layer in a `step` record: `load`, `max_vio`, … (`LoadSummary`); empty if none."""
    figures: Mapping[str, Any] = (record.get("moe") or {}).get(layer, {})
    return figures


def last_steps(steps: Sequence[R], count: int) -> list[R]:
    """The `step` records of the last `count` steps: fewer records where not every step was logged, but one at least."""
    return [step for step in steps if step["step"] > steps[-1]["step"] - count]


def flatten(record: Record) -> dict[str, float]:
    """The numbers of a `step` or `eval` record under slashed names: `train/loss`, `moe/layer03/max_vio`."""
    if record["kind"] not in ("step", "eval"):
        return {}
    group = "train" if record["kind"] == "step" else "valid"
    metrics = {f"{group}/{name.removeprefix('valid_')}": value for name, value in record.items() if name != "step"}
    for layer, values in (record.get("moe") or {}).items():
        metrics |= {f"moe/layer{int(layer):02d}/{name}": value for name, value in values.items()}
    return {name: float(value) for name, value in metrics.items() if isinstance(value, (bool, int, float))}


def _plain(value: Any, digits: int | None = None) -> Any:
    """`value` as JSON can hold it: array and tensor scalars become numbers, paths strings, NaN and infinity None."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if hasattr(value, "tolist"):  # numpy and torch, without importing either
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(item, 6) for item in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return float(f"{value:.{digits}g}") if digits else value
    return str(value) if isinstance(value, Path) else value


def _parse(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:  # bad JSON or bad UTF-8
        return None
    good = isinstance(record, dict) and isinstance(record.get("kind"), str) and isinstance(record.get("step"), int)
    return record if good else None


def _end_on_a_whole_line(path: Path) -> None:
    """Cut a torn last line off; give a whole one that lacks its newline that newline."""
    if not path.exists():
        return
    with open(path, "r+b") as file:
        content = file.read()
        rest = content[content.rfind(b"\n") + 1 :]
        if not rest:
            return
        if _parse(rest):
            file.write(b"\n")
        else:
            file.truncate(len(content) - len(rest))
