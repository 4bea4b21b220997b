"""The fields of a description, by their dotted paths: for errors that name the nearest one, and for people who ask."""

import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

TAGS = ("kind", "method")
"""Fields whose value says of which class a description is."""


@dataclass(frozen=True, slots=True)
class Place:
    """One field, and where it stands."""

    path: str
    """From the top of the description: `model.moe.router.score`."""
    info: FieldInfo
    owner: type[BaseModel]
    only: str
    """`kind: recurrent` where only descriptions of that kind have it, or only they at this path; else empty."""

    @property
    def leaf(self) -> str:
        """The last part of the path."""
        return self.path.rpartition(".")[2]

    @property
    def section(self) -> bool:
        """Whether it has fields of its own."""
        return bool(classes_in(self.info.annotation))


def classes_in(annotation: Any) -> list[type[BaseModel]]:
    """The descriptions that a field of this annotation may hold."""
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return [annotation] if issubclass(annotation, BaseModel) else []
    if typing.get_origin(annotation) is Annotated:
        return classes_in(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [found for arg in typing.get_args(annotation) for found in classes_in(arg)]
    return []


def places(cls: type[BaseModel], path: str = "", only: str = "") -> Iterator[Place]:
    """Every field of `cls`, of the descriptions in it too, in their order.

    Where a field may hold several classes the first one's fields come first; the others' have `only`.
    """
    for name, info in cls.model_fields.items():
        here = f"{path}.{name}" if path else name
        yield Place(here, info, cls, only)
        classes = classes_in(info.annotation)
        for number, inner in enumerate(classes):
            tag = tag_of(inner) if len(classes) > 1 else None
            of_kind = only if tag is None or (number == 0 and tag[0] == "kind") else f"{tag[0]}: {tag[1]}"
            yield from places(inner, here, of_kind)


def tag_of(cls: type[BaseModel]) -> tuple[str, str] | None:
    """The field whose value says that a description is of this class, and that value."""
    for tag in TAGS:
        if tag in cls.model_fields and isinstance(cls.model_fields[tag].default, str):
            return tag, cls.model_fields[tag].default
    return None
