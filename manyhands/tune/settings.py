"""A run that tunes a model, from the little that a person has to say: the other settings suit small data.

Rates are for AdamW. Full fine-tuning takes a small one, since every weight moves; an adapter, which begins at nothing,
about ten times that. Routers are frozen and the loss-free bias stays (its rate γ is 0): a few thousand sequences would
balance the experts for themselves and undo what pre-training did. The balance loss stays on, small, and is logged.
"""

from collections.abc import Sequence
from typing import Any

import yaml

from manyhands.config import BuiltConfig, RunConfig
from manyhands.config.kinds import longest_sequence
from manyhands.config.load import parse_run
from manyhands.config.shapes import tensor_shapes
from manyhands.config.tune import TuneConfig
from manyhands.errors import ConfigError
from manyhands.text.stdlib_rows import STDLIB_ROWS
from manyhands.train.trainable import patterns_of

RATES = {"full": 1e-4, "esft": 1e-4, "lora": 1e-3, "molora": 1e-3, "mov": 3e-3, "perft": 1e-3}
"""Learning rates. MoV's is larger: a vector has few numbers, each of which begins at nothing."""
_ROWS = (".jsonl", ".jsonl.gz", ".parquet")
_LONGEST = 512  # tokens of a sequence, where the model takes as many


def are_rows(sources: Sequence[str]) -> bool:
    """Whether they hold rows (conversations, prompts and completions, texts), by their names; else plain text."""
    return any(source == STDLIB_ROWS or source.startswith("hf:") or source.endswith(_ROWS) for source in sources)


def settings(
    start: str,
    model: BuiltConfig,
    tune: TuneConfig,
    *,
    train: Sequence[str] = (),
    sections: dict[str, Any] | None = None,
    overrides: Sequence[str] = (),
) -> RunConfig:
    """The run that tunes `start`, which holds `model`.

    Args:
        start: A checkpoint, a run or a hub name.
        model: What it holds.
        tune: How it is tuned.
        train: Parts of the model that `full` trains (`trainable.GROUPS`); none: all but the routers.
        sections: Settings that replace those of this file, `{section: {key: value}}`. Where `data.sources` hold rows
            it learns from rows, unless `overrides` say `rows=null`.
        overrides: `section.key=value`, on top of all.

    Raises `ConfigError` naming the field that is wrong.
    """
    values: dict[str, Any] = {
        "start": start,
        "tune": tune.model_dump(mode="json"),
        "balance": {"aux_loss_coef": 0.001, "bias_update_rate": 0.0},
        "optim": {"name": "adamw", "lr": RATES[tune.method], "weight_decay": 0.0},
        "schedule": {"kind": "cosine", "warmup_steps": 10, "min_ratio": 0.1},
        "train": {
            "max_steps": 200,
            "batch_size": 8,
            "sequence_length": min(_LONGEST, longest_sequence(model) or _LONGEST),
        },
    }
    names = tensor_shapes(model)
    if train and tune.method != "full":
        raise ConfigError(f"train: tune.method = {tune.method!r} itself says what is trained; --train is for full")
    if tune.method == "full":
        routers = patterns_of(["router"], names) if model.sparse_layers else ()
        values["trainable"] = list(patterns_of(train, names) if train else [f"!{p}" for p in routers] or ["*"])
    if are_rows((sections or {}).get("data", {}).get("sources", ())):
        values["rows"] = {}
    for section, fields in (sections or {}).items():
        values[section] = {**values.get(section, {}), **fields}
    return parse_run(yaml.safe_dump(values), "", overrides)
