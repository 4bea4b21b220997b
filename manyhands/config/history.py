"""What may change while a run goes on, and the record of it.

A run is its data, its model, the kind of its optimiser, and the order in which it sees the data: a change to one of
these makes another run. How it is watched, saved and computed changes nothing. The rest are settings: they may change
at a step, and `history` in run.yaml keeps every such change, so that the file still repeats the run.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from manyhands.config.base import Strict, parse
from manyhands.errors import ConfigError

if TYPE_CHECKING:
    from manyhands.config.run import RunConfig

_KIND = ("optim.name", "optim.router_optim")
_ORDER = ("seed", "sequence_length", "batch_size", "dtype")
_WATCHED = (
    "log_every",
    "eval_every",
    "worth_every",
    "sample_tokens",
    "save_every",
    "save_seconds",
    "keep_checkpoints",
    "keep_best",
    "trackers",
)
_COMPUTED = ("device", "experts_implementation", "recompute")
SAME = (
    "start",
    "trainable",
    "data.",
    "tokenizer.",
    "spans.",
    "rows",
    "model.",
    "tune",
    *_KIND,
    *(f"train.{name}" for name in _ORDER),
)
"""Names, or beginnings of names, of the fields that make a run what it is."""
FREE = (
    *(f"train.{name}" for name in _WATCHED + _COMPUTED),
    "trace.every",
    "trace.max_bytes",
    "parallel.ep",
    "parallel.dispatch",
)
"""Fields that change nothing of what is learnt; no record is kept of them."""


class Change(Strict):
    """From `step` on (steps done), the fields in `set` (`section.name`) have these values."""

    step: Annotated[int, Field(strict=True, ge=0)]
    set: dict[str, Any]


def settings_at(run: "RunConfig", step: int) -> "RunConfig":
    """The run as it is when `step` steps are done: its sections, and on top of them the history up to there."""
    if not run.history:
        return run
    values = run.model_dump(exclude={"history"})
    for change in run.history:
        if change.step <= step:
            for path, value in change.set.items():
                section, _, name = path.partition(".")
                values[section][name] = value
    return parse(type(run), values)


def record(history: tuple[Change, ...], step: int, changes: Mapping[str, tuple[Any, Any]]) -> tuple[Change, ...]:
    """`history` with `{field: (before, after)}` at `step`. Changes planned for these fields later on are dropped.

    The first change of a field also writes down, at step 0, what it was before.
    """
    by_step = {change.step: dict(change.set) for change in history}
    for path, (before, after) in changes.items():
        if not any(path in fields for fields in by_step.values()):
            by_step.setdefault(0, {})[path] = before
        for later in [at for at in by_step if at > step]:
            by_step[later].pop(path, None)
        by_step.setdefault(step, {})[path] = after
    return tuple(Change(step=at, set=by_step[at]) for at in sorted(by_step) if by_step[at])


def _without(history: tuple[Change, ...], paths: set[str], after: int) -> tuple[Change, ...]:
    """`history` without what it says of `paths` after that step; after step 0, without what it says of them at all."""
    kept = [
        (change.step, {path: v for path, v in change.set.items() if path not in paths or 0 < change.step <= after})
        if not after or change.step > after
        else (change.step, change.set)
        for change in history
    ]
    return tuple(Change(step=step, set=values) for step, values in kept if values)


def differences(before: "RunConfig", after: "RunConfig") -> dict[str, tuple[Any, Any]]:
    """`{section.name: (before, after)}` of the fields that differ; histories are not compared."""
    found = {}
    for section in type(before).model_fields:
        if section == "history":
            continue
        old, new = getattr(before, section), getattr(after, section)
        if not isinstance(old, Strict):
            if old != new:
                found[section] = (old, new)
            continue
        if section == "rows" and new is None:
            found[section] = (old, new)
            continue
        if type(old) is not type(new):  # a model of another kind, another method of tuning
            tag = "method" if section == "tune" else "kind"
            found[f"{section}.{tag}"] = (getattr(old, tag), getattr(new, tag, None))
            continue
        for name in type(old).model_fields:
            if getattr(old, name) != getattr(new, name):
                found[f"{section}.{name}"] = (getattr(old, name), getattr(new, name))
    return found


def go_on(before: "RunConfig", wanted: "RunConfig", step: int, where: str) -> tuple["RunConfig", dict[str, Any]]:
    """The run of `where`, described by `before`, going on after `step` steps as `wanted` says.

    Returns it with its history, and the settings that changed, `{field: (before, after)}`. With a time budget
    `train.max_steps` is only the first estimate, so a change of it alone replaces the budget. A run that stopped early
    has the steps back that it was to have once `train.early_stop` changes.

    Raises `ConfigError` naming the first field that would make it another run.
    """
    changes = differences(before, wanted)
    for path, (old, new) in changes.items():
        if path.startswith(SAME):
            raise ConfigError(
                f"{where} holds another run: its {path} is {old!r}, yours is {new!r}; "
                "choose another --out, or remove it"
            )
    changes = {path: change for path, change in changes.items() if path not in FREE}
    steps, seconds = changes.get("train.max_steps"), changes.get("train.max_seconds")
    train = wanted.train
    if steps and not seconds and train.max_seconds is not None:
        changes["train.max_seconds"] = (train.max_seconds, None)
        train = train.model_copy(update={"max_seconds": None})
    elif "train.early_stop" in changes and not steps and (planned := _but_for_early_stop(before, step)) is not None:
        changes["train.max_steps"] = (step, planned)
    elif seconds and train.max_seconds is None:  # the steps that the budget had given end with it
        changes["train.max_steps"] = (settings_at(before, step).train.max_steps, train.max_steps)
    history = before.history
    if seconds or not step:  # what it foresaw under the old settings
        history = _without(history, {*changes, "train.max_steps"} if steps or seconds else {*changes}, step)
    history = record(history, step, changes) if step else history
    return wanted.model_copy(update={"train": train, "history": history}), changes


def stopped_early(run: "RunConfig", step: int) -> bool:
    """Whether `train.early_stop` ended the run at that step: it was given as many steps as it had done by then."""
    here = [change for change in run.history if change.step == step]
    return bool(run.train.early_stop and step and here and here[0].set.get("train.max_steps") == step)


def _but_for_early_stop(run: "RunConfig", step: int) -> int | None:
    """The steps that a run which stopped early was to have; None for another."""
    if not stopped_early(run, step):
        return None
    history = tuple(change for change in run.history if change.step < step)
    return settings_at(run.model_copy(update={"history": history}), step).train.max_steps


def repeat(run: "RunConfig") -> "RunConfig":
    """A run that starts anew from a file with a history: the steps that a time budget or an early stop gave then are
    taken, not found again."""
    if not any("train.max_steps" in change.set for change in run.history):
        return run
    ends = ("train.max_seconds", "train.early_stop")
    history = tuple(
        Change(step=change.step, set={path: v for path, v in change.set.items() if path not in ends})
        for change in run.history
    )
    train = run.train.model_copy(update={"max_seconds": None, "early_stop": None})
    return run.model_copy(update={"train": train, "history": tuple(change for change in history if change.set)})
