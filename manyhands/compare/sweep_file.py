"""The file of a sweep: which runs there are to be. A grid or a list of changes, times seeds.

    preset: quickstart                       # or  config: run.yaml, beside this file
    set: [train.max_steps=200]               # of every run; as on the command line of train
    seeds: 3                                 # 0, 1, 2; or a list of them
    grid:
      optim.lr: [0.003, 0.006]
      model.moe.router.num_experts: [8, 16]

In the place of `grid`, or times it, `runs` gives named lists of changes: `wide: [model.hidden_size=128]`. A change that
has brackets or quotes of its own is put into quotes, as in a shell: `"data.sources=['text.txt']"`.
"""

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, model_validator

from manyhands.config import RunConfig
from manyhands.config.base import Strict, parse
from manyhands.config.load import load_preset, load_run
from manyhands.config.strict_yaml import read_yaml
from manyhands.errors import ConfigError

MOST_RUNS = 1000
_LONGEST = 80
Text = Annotated[str, Field(min_length=1, max_length=1000)]
Seed = Annotated[int, Field(strict=True, ge=-(1 << 63), lt=1 << 64)]


class SweepFile(Strict):
    """What a sweep's YAML file may say."""

    preset: Text | None = None
    """A run that ships with manyhands."""
    config: Text | None = None
    """A run file, from where this file lies."""
    set: tuple[Text, ...] = ()
    """Changes of every run, `section.key=value`."""
    seeds: Annotated[int, Field(strict=True, ge=1, le=MOST_RUNS)] | Annotated[tuple[Seed, ...], Field(min_length=1)] = 1
    """How many, from 0; or which."""
    grid: dict[Text, Annotated[tuple[Any, ...], Field(min_length=1)]] = Field(default_factory=dict)
    """Fields and the values that each takes: every combination is a configuration."""
    runs: dict[Text, tuple[Text, ...]] = Field(default_factory=dict)
    """Names of configurations, and the changes of each."""

    @model_validator(mode="after")
    def _consistent(self) -> "SweepFile":
        if (self.preset is None) == (self.config is None):
            raise ValueError("say what to train: one of preset: NAME, config: FILE")
        changed = [change.partition("=")[0].strip() for change in [*self.set, *itertools.chain(*self.runs.values())]]
        if "train.seed" in [*changed, *self.grid]:
            raise ValueError("train.seed: seeds says which")
        if twice := [field for field in self.grid if field in changed]:
            raise ValueError(f"{twice[0]}: in grid, and in set or runs too")
        if isinstance(self.seeds, tuple) and len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: one is given twice")
        return self


@dataclass(frozen=True)
class Planned:
    """One run of a sweep."""

    name: str
    """Of its directory."""
    source: tuple[str, str]
    """`--preset` or `--config`, and what stands behind it."""
    changes: tuple[str, ...]
    """As on the command line of train."""
    run: RunConfig


def read_sweep(path: Path) -> list[Planned]:
    """Every run, each checked as train would: configurations in the file's order, a configuration's seeds together.

    Raises `ConfigError` naming the file, the run and what is wrong with it.
    """
    try:
        values = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path}: expected preset, grid, seeds …, found {type(values).__name__}")
    file = parse(SweepFile, dict(values), str(path))
    seeds = range(file.seeds) if isinstance(file.seeds, int) else file.seeds
    combinations = list(itertools.islice(itertools.product(*file.grid.values()), MOST_RUNS + 1))
    named = file.runs or {"": ()}
    count = len(combinations) * len(named) * len(seeds)
    if count > MOST_RUNS:
        raise ConfigError(f"{path}: {count:,} runs or more; at most {MOST_RUNS:,} are taken")
    planned: list[Planned] = []
    for name, changes in named.items():
        for combination in combinations:
            chosen = [f"{field}={_value(value)}" for field, value in zip(file.grid, combination, strict=True)]
            for seed in seeds:
                label = _name([name, *(_short(change) for change in chosen)], seed)
                planned.append(_planned(path, file, label, (*file.set, *changes, *chosen, f"train.seed={seed}")))
    seen: dict[str, str] = {}
    for each in planned:
        if (other := seen.setdefault(each.run.model_dump_json(), each.name)) != each.name:
            raise ConfigError(f"{path}: {other} and {each.name} are the same run")
    names = [each.name.lower() for each in planned]
    if len(set(names)) == len(names):
        return planned
    return [replace(each, name=f"{number:03d}-{each.name}"[:_LONGEST]) for number, each in enumerate(planned)]


def _planned(path: Path, file: SweepFile, name: str, changes: tuple[str, ...]) -> Planned:
    try:
        if file.preset is not None:
            return Planned(name, ("--preset", file.preset), changes, load_preset(file.preset, changes))
        config = path.parent / str(file.config)
        return Planned(name, ("--config", str(config)), changes, load_run(config, changes))
    except ConfigError as error:
        raise ConfigError(f"{path}: {name}: {error}") from None


def _value(value: Any) -> str:
    """As an override has it."""
    text = yaml.safe_dump(value, default_flow_style=True, width=1 << 20, allow_unicode=True).strip()
    return text.removesuffix("...").strip()


def _short(change: str) -> str:
    """The last word of the field, and its value."""
    field, _, value = change.partition("=")
    return f"{field.rpartition('.')[2]}={value}"


def _name(parts: list[str], seed: int) -> str:
    """A name that any file system takes."""
    words = [re.sub(r"[^\w.=+-]+", "_", part).strip("._-") for part in parts if part]
    return "-".join([*filter(None, words), f"seed{seed}"])[-_LONGEST:].lstrip("._-")
