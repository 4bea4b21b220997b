"""A model of any kind: `kind` says which class describes it, and a description without one is a decoder's.

A new kind is a class that inherits `AnyModelConfig` and is registered, in a file of its own like `decoder.py`;
`manyhands/config/__init__.py` imports those that ship. The kinds that are built are in `kinds.py` too.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

from manyhands.config.base import Strict, parse, short_repr
from manyhands.errors import ConfigError

DECODER = "decoder"
"""The kind of a file that names none."""
BUILT = (DECODER, "encoder_decoder", "recurrent")
"""The kinds that are built, trained, saved and loaded (`models/build.py`); the others are described and counted."""

OF_NUMBERS = ("mixture_1991", "hierarchy_1994")
"""The kinds that map numbers to numbers, fitted in Python; the others are language models."""


class AnyModelConfig(Strict):
    """A model of some kind. Field names follow Hugging Face `config.json` wherever it has one."""

    kind: str


K = TypeVar("K", bound=AnyModelConfig)
KINDS: dict[str, type[AnyModelConfig]] = {}
"""Every class by its kind."""


def register(cls: type[K]) -> type[K]:
    """Make descriptions of this kind known. `kind` must have a default, which names it."""
    KINDS[cls.model_fields["kind"].default] = cls
    return cls


def read_model_config(values: Mapping[str, Any], where: str = "") -> AnyModelConfig:
    """The description that `values` are, by their `kind`. Raises `ConfigError` naming the field that is wrong."""
    kind = values.get("kind", DECODER)
    if not isinstance(kind, str) or kind not in KINDS:
        raise ConfigError(f"{where}: kind = {_unknown(kind)}" if where else f"kind = {_unknown(kind)}")
    return parse(KINDS[kind], values, where)


def not_built(kind: Any) -> str:
    """Why a model of this kind cannot be built, trained or run."""
    if kind in OF_NUMBERS:
        return "it maps numbers to numbers and is no language model; docs/api.md shows how it is fitted in Python"
    if isinstance(kind, str) and kind in KINDS:
        return f"manyhands does not build this kind yet; it builds {', '.join(BUILT)}"
    return _unknown(kind).partition(": ")[2]


def _unknown(kind: Any) -> str:
    return f"{short_repr(kind)}: there is no such kind of model; there are: {', '.join(sorted(KINDS))}"
