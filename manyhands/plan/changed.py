"""A description with some fields changed, by their last name where that names one field."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from manyhands.config import ModelConfig, parse, suggest
from manyhands.errors import ConfigError


def changed(config: ModelConfig, changes: Sequence[str], where: str) -> ModelConfig:
    """`config` with `field=value`, `router.num_experts=16`, …; values are YAML. Raises `ConfigError`."""
    from manyhands.config.strict_yaml import read_yaml  # YAML costs 15 ms

    values = config.model_dump(mode="json")
    for change in changes:
        name, equals, text = (part.strip() for part in change.partition("="))
        if not equals or not name:
            raise ConfigError(f"{where}: {change!r} is not of the form field=value")
        *parents, last = _path(values, name, where)
        here = values
        for parent in parents:
            here = here[parent]
        try:
            here[last] = read_yaml(text)
        except ValueError as error:
            raise ConfigError(f"{where}: {change[:80]!r} is not a YAML value: {error}") from None
    return parse(type(config), values, where)


def _path(values: Mapping[str, Any], name: str, where: str) -> tuple[str, ...]:
    paths = list(_paths(values, ()))
    parts = tuple(name.removeprefix("model.").split("."))
    found = [path for path in paths if path == parts] or [path for path in paths if path[-len(parts) :] == parts]
    if not found:
        raise ConfigError(
            f"{where}: unknown field {name!r}; " + suggest(parts[-1], sorted({path[-1] for path in paths}))
        )
    if len(found) > 1:
        which = ", ".join(".".join(path) for path in found)
        raise ConfigError(f"{where}: {name!r} names several fields: {which}; say which")
    return found[0]


def _paths(values: Mapping[str, Any], above: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for name, value in values.items():
        yield (*above, name)
        if isinstance(value, dict):
            yield from _paths(value, (*above, name))
