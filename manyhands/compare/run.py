"""A finished or stopped run as `compare` needs it: its settings, its journal, its losses by document, what it cost."""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from manyhands import strict_json
from manyhands.checkpoint.runs import RunDirectory
from manyhands.config import RunConfig
from manyhands.config.load import load_run
from manyhands.errors import DataError, UserError
from manyhands.files import PREPARED, RUN, TOKENIZER, VALID_TOKENS
from manyhands.trace.documents import DocumentLosses, Losses
from manyhands.trace.journal import Record, read_journal
from manyhands.trace.series import Floats

BITS = "bits per byte"
NATS = "nats per target"


@dataclass(frozen=True)
class Run:
    """One run's directory, read."""

    path: Path
    config: RunConfig
    records: list[Record]
    losses: DocumentLosses | None
    """None for a run of an earlier version, and for tasks whose losses are not kept by document."""
    sha256: dict[str, str]
    """Of its prepared files."""

    @classmethod
    def open(cls, path: Path) -> "Run":
        """Raises `UserError` if there is no run, or none that was validated; `DataError` for damaged files."""
        directory = RunDirectory(path)
        if not directory.config_file.is_file():
            raise UserError(f"{path}: there is no {RUN} in it, so it is not a run's directory")
        if not directory.journal_file.is_file():
            raise UserError(f"{path}: this run has not begun: there is no journal")
        records = read_journal(directory.journal_file)
        losses = DocumentLosses.open(directory.documents_file) if directory.documents_file.is_file() else None
        run = cls(path, load_run(directory.config_file), records, losses, _digests(directory.data_dir / PREPARED))
        if not run.evals:
            raise UserError(f"{path}: was not validated yet; let it end, or set train.eval_every")
        if run.at("last") is None:  # of a process that was killed between the two files
            return cls(path, run.config, records, None, run.sha256)
        return run

    @property
    def name(self) -> str:
        """As a person names it."""
        return str(self.path)

    @property
    def seed(self) -> int:
        """Of its weights and of the order of its data."""
        return self.config.train.seed

    @cached_property
    def steps(self) -> list[Record]:
        """Its `step` records."""
        return [record for record in self.records if record["kind"] == "step"]

    @cached_property
    def evals(self) -> list[Record]:
        """Its validations that gave a number, but what a tuning began with."""
        found = [r for r in self.records if r["kind"] == "eval" and r.get("valid_loss") is not None]
        return [record for record in found if record["step"]] or found

    @cached_property
    def start(self) -> Record:
        """The newest `start` record."""
        return next((record for record in reversed(self.records) if record["kind"] == "start"), {})

    @property
    def unit(self) -> str:
        """Of its figure."""
        return NATS if self.evals[-1].get("valid_bits_per_byte") is None else BITS

    def figure(self, which: str) -> float:
        """What it reached at its `last` or its `best` validation."""
        record = self.evals[-1] if which == "last" else min(self.evals, key=lambda record: record["valid_loss"])
        return float(record["valid_loss" if self.unit == NATS else "valid_bits_per_byte"])

    def at(self, which: str) -> Losses | None:
        """Its losses by document there, if they are of the validation that the journal has."""
        if self.losses is None:
            return None
        losses: Losses = getattr(self.losses, which)
        there = [record for record in self.evals if record["step"] == losses.step]
        reached = self.evals[-1] if which == "last" else min(self.evals, key=lambda record: record["valid_loss"])
        near = bool(there) and math.isclose(there[-1]["valid_loss"], reached["valid_loss"], rel_tol=1e-5)
        return losses if near and (which == "best" or reached["step"] == losses.step) else None

    @property
    def ended(self) -> bool:
        """Whether it came to its own end."""
        last = self.records[-1]
        ends = [record for record in self.records if record["kind"] == "end"]
        reason = ends[-1].get("reason") if ends else None
        return reason is not None and not str(reason).startswith("SIG") and ends[-1]["step"] >= last["step"]

    def curve(self, x: str) -> tuple[Floats, Floats]:
        """The training loss over `tokens` or `elapsed`, skipped updates left out."""
        import numpy as np

        name = "bits_per_byte" if self.unit == BITS else "loss"
        kept = [r for r in self.steps if not r.get("skipped") and r.get(name) is not None and r.get(x) is not None]
        return np.array([r[x] for r in kept], float), np.array([r[name] for r in kept], float)

    def validations(self, x: str) -> tuple[Floats, Floats]:
        """The validation loss over the same."""
        import numpy as np

        at = {record["step"]: record.get(x) for record in self.steps}
        name = "valid_bits_per_byte" if self.unit == BITS else "valid_loss"
        kept = [(at[r["step"]], r[name]) for r in self.evals if at.get(r["step"]) is not None]
        return np.array([x for x, _ in kept], float), np.array([y for _, y in kept], float)

    @property
    def cost(self) -> dict[str, float | None]:
        """What it took: tokens, seconds in steps, parameters in all and per token, the most memory in bytes."""
        last: dict[str, Any] = self.steps[-1] if self.steps else {}
        memory = [value for record in self.records if isinstance(value := record.get("peak_memory"), (int, float))]
        return {
            "tokens": last.get("tokens"),
            "seconds": last.get("elapsed"),
            "parameters": self.start.get("parameters"),
            "active_parameters": self.start.get("active_parameters"),
            "memory_bytes": max(memory, default=None),
        }

    def same_text(self, other: "Run") -> bool:
        """Whether both were validated on the same tokens, by their files' digests."""
        return all(
            self.sha256.get(name) is not None and self.sha256.get(name) == other.sha256.get(name)
            for name in (VALID_TOKENS,)
        )

    def same_tokenizer(self, other: "Run") -> bool:
        """Whether both cut text alike."""
        return self.sha256.get(TOKENIZER) == other.sha256.get(TOKENIZER)


def runs_in(paths: list[Path]) -> list[Path]:
    """Each run of `paths`; a folder that is no run stands for the runs in it. Raises `UserError` for one without."""
    found: list[Path] = []
    for path in paths:
        if (path / RUN).is_file() or not path.is_dir():
            found.append(path)
            continue
        inside = sorted(child for child in path.iterdir() if (child / RUN).is_file())
        if not inside:
            raise UserError(f"{path}: neither a run nor a folder of runs: there is no {RUN} in it or one level below")
        found += inside
    return list(dict.fromkeys(found))


def _digests(path: Path) -> dict[str, str]:
    try:
        with open(path, "rb") as file:
            found = strict_json.loads(file.read(1 << 20)).get("sha256") or {}
        return {str(name): str(value) for name, value in found.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: cannot be read: {' '.join(str(error).split())[:200]}") from None
