"""Reference models are made once per session."""

from collections.abc import Callable

import pytest

from .other_references import make_any
from .references import Reference

Made = Callable[..., Reference]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """(case, hostile) -> its reference, whose directory nobody changes."""
    cache: dict[tuple[str, bool], Reference] = {}

    def get(case: str, hostile: bool = False) -> Reference:
        if (case, hostile) not in cache:
            cache[case, hostile] = make_any(case, tmp_path_factory.mktemp("reference") / "model", hostile)
        return cache[case, hostile]

    return get
