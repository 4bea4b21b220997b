"""Where a run came from, for its page: the command, the machine, the versions, the data, and what was set."""

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from manyhands.config import RunConfig
from manyhands.config.base import Strict
from manyhands.format import compact, number, show
from manyhands.trace.series import Record

_LONGEST = 300
_LONGEST_COMMAND = 2000


def command_line() -> str:
    """The command that runs this process, as one would type it."""
    name, *arguments = sys.argv or [""]
    name = Path(name).name
    return shlex.join(["manyhands" if name == "__main__.py" else name, *arguments])[:_LONGEST_COMMAND]


def origin(start: Record, steps: Sequence[Record], evals: Sequence[Record]) -> dict[str, str]:
    """What the `start` record of the newest session says, in rows; what it does not know is left out."""
    told: dict[str, str] = {}
    if command := start.get("command"):
        told["command"] = str(command)
    if (own := start.get("own")) and isinstance(own, list):
        told["brought by the caller"] = ", ".join(map(str, own))
    if machine := start.get("machine"):
        parts = [str(machine.get("cpu") or ""), f"{machine['cores']} cores" if machine.get("cores") else ""]
        parts += [f"{show(machine['memory'], 'B')} of memory" if _is_number(machine.get("memory")) else ""]
        parts += [f"on {machine['device']}" if machine.get("device") not in (None, "cpu") else ""]
        told["machine"] = ", ".join(part for part in parts if part)
    versions = {"manyhands": start.get("version"), "PyTorch": start.get("torch"), "Python": start.get("python")}
    if any(versions.values()):
        told["versions"] = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    if start.get("threads"):
        told["threads, dtype"] = f"{start['threads']}, {start.get('dtype') or '–'}"
    told |= _data(start.get("data") or {}, steps, evals)
    return {label: value[:_LONGEST] for label, value in told.items()}


def _data(data: Mapping[str, Any], steps: Sequence[Record], evals: Sequence[Record]) -> dict[str, str]:
    told: dict[str, str] = {}
    if sources := data.get("sources"):
        told["text"] = ", ".join(map(str, sources))
    for side, label in (("train", "trained on"), ("valid", "validated on")):
        parts = [(f"{side}_tokens", "tokens"), (f"{side}_bytes", "bytes"), (f"{side}_documents", "documents")]
        parts.append((f"{side}_rows", "rows"))
        known = [f"{compact(data[name])} {unit}" for name, unit in parts if _is_number(data.get(name))]
        if known:
            told[label] = ", ".join(known)
    if steps:
        size, seen = data.get("train_tokens"), steps[-1].get("tokens")
        epochs = steps[-1].get("epochs") or (seen / size if size and seen else None)
        if epochs is not None:
            told["epochs"] = number(epochs, 2)
    if _is_number(data.get("unigram")) and evals:
        loss = number(evals[-1].get("valid_loss"))
        told["loss from how often tokens occur"] = f"{number(data['unigram'])} nats per token; of the model {loss}"
    return told


def unlike_defaults(run: RunConfig) -> list[tuple[str, str, str]]:
    """(field, value, default) of every setting that is not what it is by itself, as YAML has it."""
    return [(path, _text(value), _text(default)) for path, value, default in _unlike(run, "")]


def _unlike(section: Strict, prefix: str) -> Iterator[tuple[str, Any, Any]]:
    for name, field in type(section).model_fields.items():
        value, path = getattr(section, name), f"{prefix}{name}"
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        if isinstance(value, Strict):
            if type(default) is type(value) or default is None:
                yield from _unlike(value, f"{path}.")
            else:
                yield path, getattr(value, "kind", value), getattr(default, "kind", default)
                yield from _unlike(value, f"{path}.")
        elif value != default:
            yield path, value, default


def _text(value: Any) -> str:
    plain = value.model_dump(mode="json") if isinstance(value, Strict) else value
    if isinstance(plain, tuple):
        plain = [item.model_dump(mode="json") if isinstance(item, Strict) else item for item in plain]
    text = (
        yaml.safe_dump(plain, default_flow_style=True, width=10_000, allow_unicode=True).removesuffix("...\n").strip()
    )
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
