"""Where a run's metrics go besides its journal: programs of others, each an optional installation."""

import hashlib
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from manyhands.checkpoint.runs import RunDirectory
from manyhands.config import RunConfig
from manyhands.errors import ConfigError
from manyhands.parallel.ranks import Ranks
from manyhands.trace.journal import Journal, Tracker, Unwritten


class TensorBoard:
    """Event files in `<run>/tensorboard`."""

    def __init__(self, run_dir: Path, step: int, config: Mapping[str, Any]) -> None:
        module = importlib.import_module("torch.utils.tensorboard")
        self._writer = module.SummaryWriter(log_dir=str(run_dir / "tensorboard"), purge_step=step + 1)
        self._writer.add_text("config", f"```json\n{json.dumps(config, indent=1)}\n```", step)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record `metrics` at `step`."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class RunTracker:
    """Weights & Biases, or trackio, which has the same interface. The run is named after its directory.

    A run that goes on is the same run there: wandb knows it by an id made from the directory's path, trackio by name.
    """

    def __init__(self, module_name: str, run_dir: Path, config: Mapping[str, Any]) -> None:
        self._module = importlib.import_module(module_name)
        path = run_dir.resolve()
        known: dict[str, Any] = {"project": "manyhands", "name": path.name, "config": dict(config), "resume": "allow"}
        if module_name == "wandb":
            known["id"] = hashlib.sha256(str(path).encode()).hexdigest()[:16]
        self._module.init(**known)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record `metrics` at `step`."""
        self._module.log(dict(metrics), step=step)

    def close(self) -> None:
        """Finish the run."""
        self._module.finish()


def open_tracker(name: str, run_dir: Path, step: int = 0, config: Mapping[str, Any] | None = None) -> Tracker:
    """The tracker called `name`. Raises `ConfigError` with the command that installs it."""
    try:
        if name == "tensorboard":
            return TensorBoard(run_dir, step, config or {})
        return RunTracker(name, run_dir, config or {})
    except ImportError:
        raise not_installed(name) from None


def not_installed(name: str) -> ConfigError:
    """The error that says how to install a tracker."""
    what = "'manyhands[track]'" if name == "tensorboard" else name
    return ConfigError(f"train.trackers: {name} is not installed; run: pip install {what}")


def open_journal(directory: RunDirectory, run: RunConfig, step: int, ranks: Ranks) -> Journal:
    """The run's journal, which its trackers follow from `step` on; on other ranks than 0 one that writes nothing."""
    if ranks.rank:
        return Unwritten()
    description = run.model_dump(mode="json")
    trackers = [open_tracker(name, directory.path, step, description) for name in run.train.trackers]
    return Journal(directory.journal_file, trackers)
