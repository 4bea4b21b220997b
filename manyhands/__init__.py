"""manyhands: the toolkit for mixture-of-experts language models.

import manyhands as mh

model, tokenizer = mh.load("runs/quickstart")     # or a Hugging Face checkpoint, or its name on the hub
out = model(ids)                                  # out.logits, out.routings[layer], out.cache
model.save("somewhere")                           # a directory that transformers loads
mh.generate(model, tokenizer, ["def main"])       # texts continued; mh.Engine takes requests as they come
mh.train("quickstart")                            # a run; with a model, batches, a loss and callbacks of your own

moe = mh.MoELayer(mh.MoEConfig(router=mh.RouterConfig(num_experts=8, num_experts_per_tok=2)), hidden_size=512)
y, routing = moe(x)
"""

from typing import TYPE_CHECKING, Any

from manyhands.errors import (
    CheckFailed,
    CheckpointError,
    ConfigError,
    DataError,
    DiskError,
    EndedElsewhere,
    Interrupted,
    ManyhandsError,
    ProcessLost,
    RunLocked,
    StorageError,
    TrainingHalted,
    UserError,
)
from manyhands.version import __version__ as __version__

if TYPE_CHECKING:
    from manyhands.checkpoint.model import Model, load, load_model, save
    from manyhands.checkpoint.numbers import load_experts, save_experts
    from manyhands.config import (
        BalanceConfig,
        HierarchicalExpertsConfig,
        LocalExpertsConfig,
        ModelConfig,
        MoEConfig,
        RouterConfig,
        RunConfig,
        SamplingConfig,
    )
    from manyhands.engine.answer import Completion
    from manyhands.engine.engine import Engine
    from manyhands.generate.steps import complete as generate
    from manyhands.models import Decoder, HierarchicalExperts, LocalExperts, init_weights
    from manyhands.moe import LoadCounter, MoELayer, Router, Routing, balance_objective
    from manyhands.moe.balance import update_bias
    from manyhands.train.callbacks import Callback, Moment
    from manyhands.train.own import train as train

_HOMES = {
    "BalanceConfig": "manyhands.config",
    "Callback": "manyhands.train.callbacks",
    "Completion": "manyhands.engine.answer",
    "Decoder": "manyhands.models",
    "Engine": "manyhands.engine.engine",
    "HierarchicalExperts": "manyhands.models",
    "HierarchicalExpertsConfig": "manyhands.config",
    "LoadCounter": "manyhands.moe",
    "LocalExperts": "manyhands.models",
    "LocalExpertsConfig": "manyhands.config",
    "MoEConfig": "manyhands.config",
    "MoELayer": "manyhands.moe",
    "Model": "manyhands.checkpoint.model",
    "Moment": "manyhands.train.callbacks",
    "ModelConfig": "manyhands.config",
    "Router": "manyhands.moe",
    "RouterConfig": "manyhands.config",
    "Routing": "manyhands.moe",
    "RunConfig": "manyhands.config",
    "SamplingConfig": "manyhands.config",
    "balance_objective": "manyhands.moe",
    "generate": "manyhands.generate.steps",
    "init_weights": "manyhands.models",
    "load": "manyhands.checkpoint.model",
    "load_experts": "manyhands.checkpoint.numbers",
    "load_model": "manyhands.checkpoint.model",
    "save": "manyhands.checkpoint.model",
    "save_experts": "manyhands.checkpoint.numbers",
    "train": "manyhands.train.own",
    "update_bias": "manyhands.moe.balance",
}

__all__ = [
    "BalanceConfig",
    "Callback",
    "CheckFailed",
    "CheckpointError",
    "Completion",
    "ConfigError",
    "DataError",
    "Decoder",
    "DiskError",
    "EndedElsewhere",
    "Engine",
    "HierarchicalExperts",
    "HierarchicalExpertsConfig",
    "Interrupted",
    "LoadCounter",
    "LocalExperts",
    "LocalExpertsConfig",
    "ManyhandsError",
    "MoEConfig",
    "MoELayer",
    "Model",
    "ModelConfig",
    "Moment",
    "ProcessLost",
    "Router",
    "RouterConfig",
    "Routing",
    "RunConfig",
    "RunLocked",
    "SamplingConfig",
    "StorageError",
    "TrainingHalted",
    "UserError",
    "balance_objective",
    "generate",
    "init_weights",
    "load",
    "load_experts",
    "load_model",
    "save",
    "save_experts",
    "train",
    "update_bias",
]


def __getattr__(name: str) -> Any:
    """Import on first use: `import manyhands` costs no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'manyhands' has no attribute {name!r}")
    import importlib

    if name in ("generate", "train"):  # a room and a function: the room can be called
        return importlib.import_module(f"manyhands.{name}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """What there is, before and after it is first used."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
