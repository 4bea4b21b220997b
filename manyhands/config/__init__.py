"""Frozen, strict descriptions of a model and of a run. Imports no torch."""

from manyhands.config.adapter import LoraConfig
from manyhands.config.attention import AttentionConfig, RopeConfig
from manyhands.config.base import Strict, parse, suggest
from manyhands.config.decoder import ModelConfig
from manyhands.config.encoder_decoder import EncoderDecoderConfig
from manyhands.config.kinds import BuiltConfig
from manyhands.config.local_experts import HierarchicalExpertsConfig, LocalExpertsConfig
from manyhands.config.model import AnyModelConfig, read_model_config
from manyhands.config.moe import MoEConfig
from manyhands.config.packing import PackedConfig, Packing
from manyhands.config.recurrent import RecurrentConfig
from manyhands.config.router import RouterConfig
from manyhands.config.run import (
    BalanceConfig,
    DataConfig,
    GuardConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    SpansConfig,
    TokenizerConfig,
    TrainConfig,
)
from manyhands.config.sampling import SamplingConfig

__all__ = [
    "AnyModelConfig",
    "AttentionConfig",
    "BalanceConfig",
    "BuiltConfig",
    "DataConfig",
    "EncoderDecoderConfig",
    "GuardConfig",
    "HierarchicalExpertsConfig",
    "LocalExpertsConfig",
    "LoraConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimConfig",
    "PackedConfig",
    "Packing",
    "RecurrentConfig",
    "RopeConfig",
    "RouterConfig",
    "RunConfig",
    "SamplingConfig",
    "ScheduleConfig",
    "SpansConfig",
    "Strict",
    "TokenizerConfig",
    "TrainConfig",
    "parse",
    "read_model_config",
    "suggest",
]
