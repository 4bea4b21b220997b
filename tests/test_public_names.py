"""Public names, verbs and flags: changing one is a decision, made here."""

import pytest
import typer

import manyhands
from manyhands.cli.main import app

NAMES = {
    "Decoder",
    "MoEConfig",
    "MoELayer",
    "Model",
    "ModelConfig",
    "Router",
    "RouterConfig",
    "Routing",
    "RunConfig",
    "init_weights",
    "load",
    "save",
    "update_bias",
}
FLAGS = {
    "train": {"overrides", "preset", "config", "resume", "out", "data", "quiet", "json_output"},
    "generate": {
        "ignore_field",
        "checkpoint",
        "prompt",
        "max_new_tokens",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "seed",
        "stop",
        "show_routing",
        "json_output",
    },
    "models": {"name", "sparse", "dense", "sort", "check", "json_output"},
    "doctor": {"again", "json_output"},
    "bench": {"ignore_field", "model", "prompt", "new", "backend", "json_output"},
    "plan": {
        "batch",
        "bits",
        "context",
        "devices",
        "explain",
        "flops",
        "format",
        "gpu_hours",
        "imbalance",
        "include_rumours",
        "json_output",
        "kv_bits",
        "load",
        "machine",
        "model",
        "overrides",
        "plot",
        "price",
        "prompt",
        "scale",
        "tokens",
        "tokens_per_device",
        "utilisation",
        "versus",
    },
    "convert": {
        "ignore_field",
        "source",
        "target",
        "to",
        "dtype",
        "max_shard_size",
        "drop_extras",
        "agreement",
        "json_output",
        "overwrite",
    },
    "chat": {
        "ignore_field",
        "checkpoint",
        "system",
        "template",
        "max_new_tokens",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "seed",
        "stop",
        "show_routing",
    },
    "eval": {
        "ignore_field",
        "checkpoint",
        "data",
        "text_field",
        "sequence_length",
        "batch_size",
        "max_batches",
        "json_output",
    },
    "quantize": {
        "ignore_field",
        "model",
        "target",
        "experts",
        "linear",
        "group_size",
        "data",
        "text_field",
        "max_batches",
        "json_output",
        "overwrite",
    },
    "check": {"ignore_field", "model", "overrides", "backend", "dtype", "routers", "seed", "json_output"},
}


def test_exported_names() -> None:
    assert set(manyhands.__all__) == NAMES
    for name in NAMES:
        assert getattr(manyhands, name).__name__ == name
    with pytest.raises(AttributeError, match="lod"):
        manyhands.lod  # noqa: B018


def test_verbs_and_flags() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    found = {verb: {parameter.name for parameter in command.params} for verb, command in commands.items()}
    assert {verb: flags - {"help"} for verb, flags in found.items()} == FLAGS
