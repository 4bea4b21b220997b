"""`adapter_config.json` of PEFT: what we compute of it, and what we refuse by name.

A field that PEFT adds later is read past where it says nothing (null, false, empty), and refused otherwise.
"""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manyhands.checkpoint.descriptions import read_json
from manyhands.config.adapter import MOST_RANK
from manyhands.errors import CheckpointError

CONFIG = "adapter_config.json"
_LIMIT = 4 << 20
_HARMLESS = {
    *("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("peft_version", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config"),
    *("megatron_core", "qalora_group_size", "ensure_weight_tying", "runtime_config"),
}
"""What is read here, what the tensors' names say as well, and what matters in training alone."""
_BASE_UNCHANGED = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""`init_lora_weights` that leave the base model as it is; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change it."""
_NAME = re.compile(r"[\w.]+")


@dataclass(frozen=True, slots=True)
class Fields:
    """What an adapter's tensors mean."""

    path: Path
    r: int
    alpha: float
    rslora: bool
    ranks: dict[str, int]
    """`rank_pattern`: end of a module's name -> its own r."""
    alphas: dict[str, float]
    parameters: tuple[str, ...]
    """`target_parameters`."""
    version: tuple[int, ...] | None
    """Of the PEFT that wrote it; None where it does not say."""
    base: str | None

    def scale(self, names: Iterable[str], r: int) -> float:
        """s of a module known by these names, whose tensors have rank r. Raises `CheckpointError` for another rank."""
        names = list(names)
        said = _first(self.ranks, names, self.r)
        if said != r:
            raise CheckpointError(f"{self.path}: {names[0]} has rank {said}; its tensors have {r}")
        alpha: float = _first(self.alphas, names, self.alpha)
        return alpha / (math.sqrt(r) if self.rslora else r)


def _first(patterns: dict[str, Any], names: Iterable[str], default: Any) -> Any:
    for end, value in patterns.items():
        if any(name == end or name.endswith(f".{end}") for name in names):
            return value
    return default


def read_fields(directory: Path) -> Fields:
    """Raises `CheckpointError` for what is missing, malformed, or would change what the model computes."""
    path = directory / CONFIG
    if directory.is_file():
        raise CheckpointError(f"{directory}: is a file; name the directory that holds {CONFIG}")
    values = read_json(path, _LIMIT)

    def bad(name: str, expected: str) -> CheckpointError:
        return CheckpointError(f"{path}: {name} = {json.dumps(values.get(name))[:80]}: expected {expected}")

    if values.get("peft_type") != "LORA":
        raise bad("peft_type", '"LORA"')
    for name, value in values.items():
        empty = value is None or value is False or value in ([], {}, "", "none")
        if name not in _HARMLESS and not empty:
            raise CheckpointError(
                f"{path}: {name[:80]!r} = {json.dumps(value)[:80]} changes what an adapter computes in a way that is "
                "not understood here"
            )
    if values.get("init_lora_weights") not in _BASE_UNCHANGED:
        raise bad("init_lora_weights", "one that leaves the base model as it is: true, false, gaussian, eva")
    r, alpha = values.get("r", 8), values.get("lora_alpha", 8)
    if type(r) is not int or not 1 <= r <= MOST_RANK:
        raise bad("r", f"an integer from 1 to {MOST_RANK}")
    if not _number(alpha):
        raise bad("lora_alpha", "a number")
    if not isinstance(values.get("use_rslora", False), bool):
        raise bad("use_rslora", "true or false")
    parameters = values.get("target_parameters") or []
    if not isinstance(parameters, list) or not all(isinstance(name, str) for name in parameters):
        raise bad("target_parameters", "a list of names")
    base = values.get("base_model_name_or_path")
    return Fields(
        path,
        r,
        float(alpha),
        values.get("use_rslora", False),
        _patterns(path, values, "rank_pattern", lambda n: type(n) is int and 1 <= n <= MOST_RANK),
        _patterns(path, values, "alpha_pattern", _number),
        tuple(parameters),
        _version(values.get("peft_version")),
        base if isinstance(base, str) else None,
    )


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _patterns(path: Path, values: dict[str, Any], name: str, valid: Any) -> dict[str, Any]:
    """Ends of names. PEFT takes any regular expression, which a file could make endless; of those only `.*\\.` before
    a name is taken, which PEFT itself writes."""
    patterns = values.get(name) or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{path}: {name}: expected an object")
    found = {}
    for pattern, value in patterns.items():
        end = pattern.removeprefix("^").removeprefix(r".*\.").replace(r"\.", ".")
        if not _NAME.fullmatch(end) or not valid(value):
            raise CheckpointError(f"{path}: {name}: {pattern[:80]!r} = {json.dumps(value)[:40]} is not understood here")
        found[end] = value
    return found


def _version(value: Any) -> tuple[int, ...] | None:
    """`0.19.1`, and `0.19.1.dev0`, as numbers."""
    found = re.match(r"(\d{1,4})\.(\d{1,4})\.(\d{1,4})", value[:32]) if isinstance(value, str) else None
    return None if found is None else tuple(map(int, found.groups()))
