"""`expert_cfg.json`, as DeepSeek's ESFT has it: which experts of a model are trained.

{"experts": {"1": [3, 17], "2": [5]}, "shared_experts": false, "non_expert_modules": false}
"""

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from manyhands.config import Strict, parse
from manyhands.config.tune import EsftTuning
from manyhands.errors import DataError
from manyhands.files import write_atomic
from manyhands.strict_json import read_object

EXPERT_CFG = "expert_cfg.json"
_LIMIT = 16 << 20


class ExpertCfg(Strict):
    """What the file says; layers are numbered from 0, dense ones too."""

    experts: dict[int, tuple[Annotated[int, Field(strict=True, ge=0)], ...]]
    shared_experts: bool
    non_expert_modules: bool


def read_expert_cfg(path: Path) -> dict[str, Any]:
    """Fields of `EsftTuning`. Raises `DataError` for a file that is none, `ConfigError` naming the field."""
    values = read_object(path, _LIMIT, DataError)
    return parse(ExpertCfg, values, str(path)).model_dump()


def write_expert_cfg(path: Path, how: EsftTuning) -> None:
    """Of a tuning whose experts are chosen. Raises `StorageError` if the disk refuses."""
    fields = how.model_dump(mode="json", include=set(ExpertCfg.model_fields))
    write_atomic(path, json.dumps(fields) + "\n")
