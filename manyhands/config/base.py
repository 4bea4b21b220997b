"""Strict, frozen descriptions, and errors a person can act on.

Every config class inherits `Strict`: unknown fields are refused, values are checked on construction and never
change afterwards. `parse`, and calling the class, turn pydantic's report into one `ConfigError` line (`wording.py`). So
the library says what the command line says.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from manyhands.config.nearest import suggest
from manyhands.config.wording import one_line, short_repr
from manyhands.errors import ConfigError

__all__ = ["Strict", "parse", "short_repr", "suggest"]

C = TypeVar("C", bound="Strict")


if TYPE_CHECKING:  # checkers see pydantic's own class, and with it the fields as arguments
    _Model = BaseModel
else:

    class _Speaking(type(BaseModel)):
        """Calls that fail raise `ConfigError`. Nested values are built by pydantic, so errors keep the whole path."""

        def __call__(cls, *args, **values):
            """An instance."""
            try:
                return super().__call__(*args, **values)
            except ValidationError as error:
                raise _config_error(cls, error, cls.__name__) from None

    class _Model(BaseModel, metaclass=_Speaking):
        """pydantic's model, with `ConfigError` for invalid values."""

        @classmethod
        def model_validate(cls, obj, **how):
            """An instance of plain values."""
            try:
                return super().model_validate(obj, **how)
            except ValidationError as error:
                raise _config_error(cls, error, cls.__name__) from None


class Strict(_Model):
    """Base of all configs: frozen, no unknown fields, no NaN or infinity, integers not converted from other types.

    A call with invalid values, and `model_validate` of them, raise `ConfigError` with one line.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True, protected_namespaces=()
    )


def parse(cls: type[C], values: Mapping[str, Any], where: str = "") -> C:
    """Build `cls` from plain values. `where` (a file name, say) starts the message if it fails.

    Raises `ConfigError` with one line about the first thing that is wrong.
    """
    try:
        return cls.__pydantic_validator__.validate_python(values)  # type: ignore[no-any-return]
    except ValidationError as error:
        raise _config_error(cls, error, where) from None


def _config_error(cls: type[Strict], error: ValidationError, where: str) -> ConfigError:
    return ConfigError((f"{where}: " if where else "") + one_line(cls, error))
