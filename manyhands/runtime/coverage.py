"""What of a config a fast path computes. It refuses all else, also what nobody had thought of when it was written."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from manyhands.config.base import Strict

MOST_ANSWERS = 1024


@dataclass(frozen=True, eq=False)
class Coverage:
    """The fields of a config class that a fast path computes, each with the values it knows (of a tuple,
    of each of its entries); None is every value.

    A field that is not named here must have its default. A value is refused unless it is named, so that a new kind of
    score or norm goes the reference's way until the fast path learns it. A subclass is refused: what it means by a
    field, or adds, is not known here.
    """

    fields: Mapping[str, tuple[Any, ...] | None]
    of: type[Strict]
    _answered: dict[int, tuple[Strict, bool]] = field(default_factory=dict)
    """By identity; a config is frozen, and held here, so that its identity is not given to another."""

    def covers(self, config: Strict) -> bool:
        """Whether everything `config` asks for is computed."""
        if (found := self._answered.get(id(config))) is None:
            if len(self._answered) >= MOST_ANSWERS:
                self._answered.clear()
            found = self._answered[id(config)] = (config, self._covers(config))
        return found[1]

    def _covers(self, config: Strict) -> bool:
        if type(config) is not self.of:
            return False
        defaults = type(config).model_fields
        for name, value in config.__dict__.items():
            if name not in self.fields:
                if name not in defaults or value != defaults[name].get_default(call_default_factory=True):
                    return False
                continue
            known, values = self.fields[name], value if isinstance(value, tuple) else (value,)
            if known is not None and any(v not in known for v in values):
                return False
        return True
