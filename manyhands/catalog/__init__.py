"""The catalogue of published systems: one TOML file each, every number with its source. Needs no torch.

from manyhands.catalog import load, names

entry = load("deepseek-v3")
entry.config.moe.router.num_experts, [figure.printed for figure in entry.published]
"""

import functools
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from manyhands.catalog.entry import COMPARED, FACTS, Entry, Figure, Kind, Mixture, Storage
from manyhands.catalog.shape import DecoderShape, Shape, TranslatorShape
from manyhands.config import parse
from manyhands.errors import ConfigError

__all__ = [
    "COMPARED",
    "FACTS",
    "DecoderShape",
    "Entry",
    "Figure",
    "Kind",
    "Mixture",
    "Shape",
    "Storage",
    "TranslatorShape",
    "entries",
    "load",
    "names",
]

_SIXTEEN = {"bfloat16": "BF16", "float16": "FP16"}
_SYSTEMS = Path(__file__).parent / "systems"


@functools.cache
def names() -> list[str]:
    """The id of every system, sorted."""
    return sorted(path.stem for path in _SYSTEMS.glob("*.toml"))


@functools.cache
def load(name: str) -> Entry:
    """One entry, by its id in any case. Raises `ConfigError` with the nearest name for one that is not there."""
    wanted = name.lower()
    if wanted not in names():
        import difflib

        near = difflib.get_close_matches(wanted, names(), n=3, cutoff=0.5) or names()
        hint = f"the nearest: {', '.join(near)}" if len(near) < 4 else "`manyhands models` lists what is there"
        raise ConfigError(f"{name!r} is not in the catalogue; {hint}")
    values = _read(wanted)
    if "same_as" in values:
        original = _read(values["same_as"])
        values |= {key: original[key] for key in ("config_fields", "shape") if key in original}
        values["architecture"] = original["architecture"]
    return parse(Entry, values, f"catalogue entry {wanted}")


def entries() -> Iterator[Entry]:
    """Every entry, read one by one."""
    return (load(name) for name in names())


def _read(name: str) -> dict[str, Any]:
    values: dict[str, Any] = tomllib.loads((_SYSTEMS / f"{name}.toml").read_text(encoding="utf-8"))
    values["id"] = name
    values["figures"] = values.pop("figure", [])
    if "config" in values:
        nulls = dict.fromkeys(values.pop("config_null", ()))  # what config.json sets to null: TOML has no word for it
        values["config_fields"] = values.pop("config") | nulls
        dtype = values["config_fields"].get("torch_dtype")
        if dtype in _SIXTEEN and "storage" not in values:
            bits = dict.fromkeys(("routed", "linear", "embedding", "rest"), 16)
            values["storage"] = {"format": _SIXTEEN[dtype], **bits, "source": values["sources"][0]}
    return values
