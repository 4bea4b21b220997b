"""Public names, verbs and flags: changing one is a decision, made here."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import manyhands
from manyhands import errors, hf
from manyhands.cli.main import app

NAMES = {
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
}
HF = {"Seen", "expert_weights", "record", "register_experts", "use_experts", "watch"}
FLAGS = {
    "config": {"field", "json_output"},
    "presets": {"json_output"},
    "train": {
        "overrides",
        "preset",
        "config",
        "resume",
        "out",
        "data",
        "json_output",
        "strict",
        "print_config",
        "dry_run",
    },
    "tune": {
        *("model", "data", "valid", "method", "train", "by", "threshold", "trace", "experts", "out", "resume", "lr"),
        *("r", "alpha", "targets", "num_experts", "top_k", "show_data", "strict"),
        *("max_steps", "max_seconds", "batch_size", "sequence_length", "seed", "set_", "json_output"),
    },
    "report": {"runs", "out", "strict", "json_output"},
    "generate": {
        "adapter",
        "which",
        "trace",
        "trace_limit",
        *("memory", "cache_policy", "pin"),
        "without_expert",
        "replay",
        "exact",
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
        "speculate",
        "json_output",
    },
    "inspect": {
        *(
            "subject",
            "data",
            "against",
            "checkpoints",
            "tokenizer",
            "out",
            "max_tokens",
            "sequence_length",
            "text_field",
        ),
        *("random_routers", "draws", "seed", "ignore_field", "json_output", "ablate"),
    },
    "serve": {
        "adapter",
        *("checkpoint", "model", "served_model_name", "host", "port", "api_key", "api_key_file", "insecure"),
        "allow_origin",
        *("max_sequences", "max_batch_tokens", "max_waiting", "kv_memory", "memory", "max_body"),
        *(
            "request_timeout",
            "shutdown_timeout",
            "exact",
            "prefix_caching",
            "ignore_field",
            "trace",
            "trace_limit",
        ),
        *("cache_policy", "pin"),
    },
    "models": {"name", "sparse", "dense", "sort", "by", "check", "json_output"},
    "simulate": {
        *("trace", "policies", "budgets", "disk", "memory_rate", "sequences", "tokens", "record_bytes", "pin"),
        *("plot", "json_output", "layout", "placement", "redundant", "groups", "node", "network", "row_bytes"),
    },
    "compare": {"runs", "at", "report", "json_output"},
    "sweep": {"file", "out", "parallel", "dry_run", "json_output"},
    "doctor": {"again", "disk_file", "record", "speeds", "json_output"},
    "bench": {"ignore_field", "model", "prompt", "new", "backend", "batch", "remember", "json_output"},
    "choose": {
        *("models", "machine", "memory", "bandwidth", "disk", "host", "devices", "users", "context", "tokens_in"),
        *("tokens_out", "tokens_per_second", "ttft", "price", "per_hour", "per_million", "license", "min_total"),
        *("min_active", "mmlu", "sparse", "format", "kv_bits", "layout", "trace", "rows", "plot", "json_output"),
    },
    "plan": {
        "accepted",
        "ep",
        "speculate",
        "train_memory",
        "api_price",
        "bandwidth",
        "cached",
        "in_out",
        "batch",
        "bits",
        "context",
        "count",
        "devices",
        "disk",
        "explain",
        "flops",
        "format",
        "gpu_hours",
        "imbalance",
        "include_rumours",
        "json_output",
        "kv_bits",
        "load",
        "network",
        "machine",
        "memory",
        "memory_size",
        "model",
        "overrides",
        "plot",
        "price",
        "prompt",
        "scale",
        "tokens",
        "tokens_per_device",
        "trace",
        "utilisation",
        "versus",
    },
    "convert": {
        "which",
        "ignore_field",
        "adapter",
        "as_adapter",
        "source",
        "target",
        "to",
        "dtype",
        "max_shard_size",
        "drop_extras",
        "agreement",
        "json_output",
        "overwrite",
        "tokenizer",
        "file_type",
        "without_vocabulary",
    },
    "chat": {
        "history",
        "adapter",
        "trace",
        "trace_limit",
        *("memory", "cache_policy", "pin"),
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
        "which",
        "adapter",
        "trace",
        "trace_limit",
        "ignore_field",
        "checkpoint",
        "data",
        "text_field",
        "sequence_length",
        "batch_size",
        "max_batches",
        "tasks",
        "task_dir",
        "num_fewshot",
        "limit",
        "apply_chat_template",
        "add_bos",
        "output",
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
        "measure",
        "json_output",
        "overwrite",
    },
    "upcycle": {
        *("model", "target", "experts", "top_k", "granularity", "drop", "noise", "seed", "to", "dtype"),
        *("max_shard_size", "overwrite", "ignore_field", "json_output"),
    },
    "prune": {
        *("model", "target", "keep", "by", "merge", "data", "text_field", "trace", "max_batches", "measure", "curve"),
        *("seed", "to", "dtype", "max_shard_size", "drop_extras", "overwrite", "ignore_field", "json_output"),
    },
    "lab claims": {"check", "document", "only", "brief", "markdown", "json_output"},
    "lab run": {"data", "every", "experiments", "json_output", "quick", "report", "seeds"},
    "trace show": {"trace", "verify", "json_output"},
    "trace import": {
        *("source", "target", "format", "layers", "num_experts", "num_experts_per_tok", "prompt_tokens", "json_output"),
    },
    "trace export": {"trace", "target", "array"},
    "check": {"ignore_field", "model", "overrides", "backend", "dtype", "routers", "layout", "seed", "json_output"},
}


def test_exported_names() -> None:
    assert set(manyhands.__all__) == NAMES and list(manyhands.__all__) == sorted(manyhands.__all__)
    for name in NAMES:
        assert getattr(manyhands, name).__name__.rpartition(".")[2] == name
    with pytest.raises(AttributeError, match="lod"):
        manyhands.lod  # noqa: B018
    assert set(hf.__all__) == HF


def test_dir_shows_what_there_is() -> None:
    assert {name for name in dir(manyhands) if not name.startswith("_")} == NAMES
    assert "__version__" in dir(manyhands)


def test_every_error_is_exported() -> None:
    ours = {n for n, found in vars(errors).items() if isinstance(found, type) and issubclass(found, Exception)}
    assert ours <= NAMES and all(getattr(manyhands, name) is getattr(errors, name) for name in ours)


def test_what_a_type_checker_sees_is_what_there_is() -> None:
    """Lazy names stand three times in `__init__`: for type checkers, for the import, and in `__all__`."""
    tree = ast.parse(Path(manyhands.__file__).read_text(encoding="utf-8"))
    static = {
        alias.asname or alias.name: node.module
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert static == manyhands._HOMES


def test_importing_is_light() -> None:
    """No torch, and nothing else that takes time, before a name is used."""
    code = "import sys, manyhands; dir(manyhands), manyhands.ConfigError; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "pydantic", "yaml", "typer", "rich"} & set(loaded)


def test_verbs_and_flags() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    groups = {verb: command.commands for verb, command in commands.items() if hasattr(command, "commands")}
    commands = {verb: command for verb, command in commands.items() if verb not in groups}
    commands |= {f"{group} {verb}": command for group, verbs in groups.items() for verb, command in verbs.items()}
    found = {verb: {parameter.name for parameter in command.params} for verb, command in commands.items()}
    assert {verb: flags - {"help"} for verb, flags in found.items()} == FLAGS
