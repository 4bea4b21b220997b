"""Run descriptions from YAML files and presets, with `section.key=value` overrides on top."""

import itertools
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from manyhands.config.base import parse, suggest
from manyhands.config.kinds import BuiltConfig
from manyhands.config.run import RunConfig
from manyhands.config.strict_yaml import read_yaml
from manyhands.errors import ConfigError

_PRESETS = resources.files("manyhands.config") / "presets"


def preset_names() -> list[str]:
    """The names `--preset` takes."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _PRESETS.iterdir() if entry.name.endswith(".yaml"))


def preset_about(name: str) -> str:
    """What the preset is for: the comment at its head, in one line."""
    head = itertools.takewhile(lambda line: line.startswith("#"), preset_text(name).splitlines())
    return " ".join(line.lstrip("# ") for line in head)


def load_preset(name: str, overrides: Sequence[str] = ()) -> RunConfig:
    """A run that ships with the package. Raises `ConfigError` for an unknown name or a bad override."""
    return parse_run(preset_text(name), f"preset {name}", overrides)


def preset_text(name: str) -> str:
    """The file of a preset. Raises `ConfigError` for an unknown name."""
    if name not in preset_names():
        raise ConfigError(f"unknown preset {name!r}; " + suggest(name, preset_names()))
    return (_PRESETS / f"{name}.yaml").read_text(encoding="utf-8")


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """A run from a YAML file. Raises `ConfigError` naming the file and the field that is wrong."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return parse_run(text, str(path), overrides)


def parse_run(text: str, where: str, overrides: Sequence[str] = ()) -> RunConfig:
    """A run from YAML text; `where` names its origin in errors."""
    values = _read_yaml(text, f"{where}: not valid YAML")
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: expected sections (data, model, …), found {type(values).__name__}")
    for override in overrides:
        _apply(values, override)
    return parse(RunConfig, values, where)


def described_model(run: RunConfig, where: str) -> BuiltConfig:
    """The model of a run file. Raises `ConfigError` if the file leaves that to the checkpoint it starts from."""
    if not run.describes_model:
        raise ConfigError(f"{where}: its model is that of start = {run.start!r}: name that in its place")
    return run.model


def dump_run(run: RunConfig) -> str:
    """The resolved run as YAML; `parse_run` reads it back to an equal value.

    A field of no section is left out where it says nothing, and so are `rows`, and `spans` where nothing learns from
    spans: files of runs that do not use them stay as they were.
    """
    idle: dict[str, Any] = {
        name: True
        for name in ("start", "trainable", "rows", "tune")
        if getattr(run, name) == type(run).model_fields[name].default
    }
    if run.model.kind != "encoder_decoder":
        idle["spans"] = True
    if not run.data.valid:
        idle["data"] = {"valid"}
    return yaml.safe_dump(run.model_dump(mode="json", exclude=idle), sort_keys=False, allow_unicode=True)


def _read_yaml(text: str, complaint: str) -> Any:
    """Plain values from YAML text."""
    try:
        return read_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{complaint}: {error}") from None


def _apply(values: dict[str, Any], override: str) -> None:
    """Set `section.key=value` in nested `values`; the value is read as YAML."""
    path, equals, text = override.partition("=")
    if not equals or not path.strip():
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    value = _read_yaml(text, f"override {override[:80]!r} is not a YAML value")
    *parents, last = path.strip().split(".")
    here = values
    for name in parents:
        below = here.setdefault(name, {})
        if below is None:
            below = here[name] = {}
        if not isinstance(below, dict):
            raise ConfigError(f"override {override!r}: {name!r} is a value, not a section")
        here = below
    here[last] = value
