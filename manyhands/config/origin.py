"""The resolved run as YAML that says, behind each value, where it comes from."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from manyhands.config.load import dump_run
from manyhands.config.run import RunConfig
from manyhands.config.strict_yaml import read_yaml
from manyhands.terminal import shown

_COLUMN = 58
_COMMAND_LINE = "command line"


def with_origins(run: RunConfig, text: str, where: str, overrides: Sequence[str]) -> str:
    """`run`, which `text` and `overrides` gave, as YAML that `parse_run` reads back; `where` names the text's origin.

    Each value is followed by `# default`, `# WHERE` or `# command line`. The model of a run that takes it from a
    checkpoint is left out.
    """
    values = read_yaml(dump_run(run))
    lines = []
    if not run.describes_model:
        del values["model"]
        lines.append(shown(f"# model: that of start = {run.start}"))
    given = read_yaml(text) or {}
    changed = [override.partition("=")[0].strip() for override in overrides]
    path: list[str] = []
    for line in yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=1 << 30).splitlines():
        key, colon, _ = line.strip().partition(":")
        depth = (len(line) - len(line.lstrip())) // 2
        here = [*path[:depth], key]
        found = _at(values, here) if colon and depth <= len(path) else _NOTHING
        if found is _NOTHING or line.lstrip().startswith("- "):
            lines.append(line)
            continue
        path = here
        if isinstance(found, dict) and found:
            lines.append(line)
            continue
        origin = "default" if _at(given, here) is _NOTHING else shown(where).replace("\n", " ")
        if any(".".join([*here, ""]).startswith(f"{name}.") for name in changed):
            origin = _COMMAND_LINE
        lines.append(f"{line:<{_COLUMN}} # {origin}")
    return "\n".join(lines) + "\n"


_NOTHING = object()


def _at(values: Any, path: Sequence[str]) -> Any:
    for name in path:
        if not isinstance(values, Mapping) or name not in values:
            return _NOTHING
        values = values[name]
    return values
