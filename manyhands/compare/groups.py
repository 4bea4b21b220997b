"""Runs that differ in nothing but their seed, together; and what tells such groups apart."""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from manyhands.compare.run import Run
from manyhands.config import RunConfig
from manyhands.config.base import short_repr
from manyhands.config.history import FREE
from manyhands.errors import UserError
from manyhands.format import NONE

_SEED = "train.seed"
_TOLD = 3  # fields that a name has room for


@dataclass(frozen=True)
class Group:
    """One configuration."""

    letter: str
    name: str
    """What it differs in, for people: `optim.lr 0.003`."""
    fields: Mapping[str, Any]
    """Every field that the groups differ in, and its value here; absent where this kind of model has none."""
    runs: tuple[Run, ...]

    @property
    def label(self) -> str:
        """Letter and name."""
        return f"{self.letter}: {self.name}" if self.name else self.letter


def grouped(runs: Sequence[Run]) -> list[Group]:
    """The groups in the order of their first runs. Raises `UserError` for two runs of one configuration and seed."""
    found: list[tuple[dict[str, Any], list[Run]]] = []
    for run in runs:
        settings = _settings(run.config)
        place = next((members for known, members in found if known == settings), None)
        if place is None:
            found.append((settings, [run]))
            continue
        twin = next((other for other in place if other.seed == run.seed), None)
        if twin is not None:
            raise UserError(
                f"{twin.name} and {run.name} are the same configuration with the same seed ({run.seed}): they are one "
                "sample, not two; name one of them, or train one with another train.seed"
            )
        place.append(run)
    if len(found) > len(string.ascii_uppercase):
        raise UserError(f"{len(found)} configurations are more than the {len(string.ascii_uppercase)} a page can tell")
    names = sorted({name for settings, _ in found for name in settings})
    missing = object()
    differing = [n for n in names if any(s.get(n, missing) != found[0][0].get(n, missing) for s, _ in found)]
    return [
        Group(letter, _name(differing, settings), {n: settings[n] for n in differing if n in settings}, tuple(members))
        for letter, (settings, members) in zip(string.ascii_uppercase, found, strict=False)
    ]


def shown(value: Any) -> str:
    """A field's value in a few characters."""
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else short_repr(value).strip("'")


def _settings(config: RunConfig) -> dict[str, Any]:
    """Every field that changes what is learnt, by its whole name, but the seed.

    A time budget writes the steps that it gave into the run's history: a measurement, no setting.
    """
    flat = _flat(config.model_dump(mode="json", exclude={"history"}), "")
    for name in (_SEED, *FREE):
        flat.pop(name, None)
    budget = config.train.max_seconds is not None
    changes = {
        f"history, step {change.step}: {name}": value
        for change in config.history
        for name, value in change.set.items()
        if not (budget and name == "train.max_steps") and name not in FREE
    }
    return flat | changes


def _flat(values: Mapping[str, Any], above: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{above}{name}.") if isinstance(value, dict) and value else {f"{above}{name}": value}
    return found


def _name(differing: Sequence[str], settings: Mapping[str, Any]) -> str:
    """The last words of the fields, as many as tell them apart."""
    told = []
    for path in differing[:_TOLD]:
        parts = path.split(".")
        count = next(
            n
            for n in range(1, len(parts) + 1)
            if n == len(parts) or sum(other.split(".")[-n:] == parts[-n:] for other in differing) == 1
        )
        value = shown(settings[path]) if path in settings else NONE
        told.append(f"{'.'.join(parts[-count:])} {value}")
    more = f" and {len(differing) - _TOLD} more" if len(differing) > _TOLD else ""
    return ", ".join(told) + more
