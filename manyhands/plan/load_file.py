"""A recorded load: which share of the routed pairs each expert took, layer by layer.

Read from a run's `journal.jsonl` (its last step with loads) or from what `manyhands eval --json` printed.
"""

from pathlib import Path
from typing import Any

from manyhands import strict_json
from manyhands.config import ModelConfig
from manyhands.errors import ConfigError
from manyhands.plan.traffic import Load

_LIMIT = 1 << 28


def read_load(path: str | Path, config: ModelConfig) -> Load:
    """Shares per sparse layer, in the order of the layers. Raises `ConfigError` if they do not fit the model."""
    layers = _layers(_newest(Path(path)))
    if layers is None:
        raise ConfigError(f"{path}: no loads in it; expected a run's journal.jsonl or the output of eval --json")
    if config.moe is None:
        raise ConfigError(f"{path}: the model is dense: it has no experts to be loaded")
    expected = [str(layer) for layer in config.sparse_layers]
    if sorted(layers, key=_order) != expected:
        raise ConfigError(f"{path}: loads of {len(layers)} layers, the model has {len(expected)} sparse ones")
    return [_shares(layers[name], config.moe.router.num_experts, f"{path}: layer {name}") for name in expected]


def _newest(path: Path) -> Any:
    try:
        if path.stat().st_size > _LIMIT:
            raise ConfigError(f"{path}: more than {_LIMIT >> 20} MB is too long for a load")
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".jsonl":
            return strict_json.loads(text)
        for line in reversed(text.splitlines()):
            record = strict_json.loads(line) if '"load"' in line else None
            if isinstance(record, dict) and _layers(record) is not None:
                return record
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    return None


def _layers(record: Any) -> dict[str, Any] | None:
    """{layer: loads} of a journal's step (`moe`) or of an evaluation (`load`)."""
    if not isinstance(record, dict):
        return None
    found = record.get("moe") or record.get("load")
    if not isinstance(found, dict) or not found:
        return None
    loads = {str(name): value.get("load") if isinstance(value, dict) else value for name, value in found.items()}
    return loads if all(isinstance(value, list) for value in loads.values()) else None


def _shares(load: list[Any], num_experts: int, where: str) -> list[float]:
    if len(load) != num_experts:
        raise ConfigError(f"{where}: loads of {len(load)} experts, the model has {num_experts}")
    numbers = [float(x) for x in load if isinstance(x, int | float) and not isinstance(x, bool) and 0 <= x < 1e18]
    if len(numbers) != num_experts or not sum(numbers):
        raise ConfigError(f"{where}: the loads must be finite, at least 0 and not all 0")
    return [x / sum(numbers) for x in numbers]


def _order(name: str) -> tuple[int, str]:
    return len(name), name
