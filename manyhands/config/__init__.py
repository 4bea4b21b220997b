"""Frozen, strict descriptions of a model and of a run. Imports no torch."""

from manyhands.config.base import Strict, parse, suggest
from manyhands.config.model import AttentionConfig, ModelConfig, MoEConfig, RopeConfig, RouterConfig
from manyhands.config.packing import PackedConfig, Packing
from manyhands.config.run import (
    BalanceConfig,
    DataConfig,
    GuardConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)
from manyhands.config.sampling import SamplingConfig

__all__ = [
    "AttentionConfig",
    "BalanceConfig",
    "DataConfig",
    "GuardConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimConfig",
    "PackedConfig",
    "Packing",
    "RopeConfig",
    "RouterConfig",
    "RunConfig",
    "SamplingConfig",
    "ScheduleConfig",
    "Strict",
    "TrainConfig",
    "parse",
    "suggest",
]
