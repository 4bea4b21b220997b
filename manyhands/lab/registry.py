"""Which experiments there are. The descriptions are data; an experiment's code is imported when it runs."""

import tomllib
from collections.abc import Callable
from importlib import import_module, resources

from manyhands.config import parse, suggest
from manyhands.errors import ConfigError
from manyhands.lab.experiment import Description, Outcome
from manyhands.lab.job import Job

_FOLDER = resources.files("manyhands.lab") / "experiments"


def names() -> list[str]:
    """Every experiment, in alphabetical order."""
    return sorted(file.name.removesuffix(".toml") for file in _FOLDER.iterdir() if file.name.endswith(".toml"))


def describe(name: str) -> Description:
    """What it asks. Raises `ConfigError` if there is no such experiment."""
    if name not in (known := names()):
        raise ConfigError(f"there is no experiment {name!r}; {suggest(name, known)}")
    return parse(Description, tomllib.loads((_FOLDER / f"{name}.toml").read_text(encoding="utf-8")), f"{name}.toml")


def find(name: str) -> Callable[[Job], Outcome]:
    """The function that runs it; imports what it needs."""
    describe(name)
    module = import_module(f"manyhands.lab.experiments.{name.replace('-', '_')}")
    run: Callable[[Job], Outcome] = module.run
    return run
