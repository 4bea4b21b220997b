"""`manyhands prune`: a mixture written with fewer experts, and what that cost on text.

One pass over the files says what experts are worth and, with a curve, runs every way to shrink beside the whole model;
the chosen way is written tensor by tensor, and what was written is read again and measured.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manyhands.checkpoint.convert import Progress
from manyhands.checkpoint.safetensors.shards import MAX_SHARD_SIZE
from manyhands.checkpoint.source import Source, open_source
from manyhands.config import ModelConfig
from manyhands.errors import CheckpointError, ConfigError, UserError
from manyhands.families import family_named, misfit
from manyhands.quantize.receipt import Sample
from manyhands.trace.recording import Trace
from manyhands.tune.by_layer import ByLayer, check_layer_fits
from manyhands.tune.curve import Arm, keep_by, run_arms
from manyhands.tune.importance import By, traced
from manyhands.tune.keep import fewer, shrunk_tensors
from manyhands.tune.merge import Merge
from manyhands.tune.pruned import bytes_of, controls, described, figures, points
from manyhands.tune.write import plan, write


@dataclass(frozen=True, slots=True)
class Pruning:
    """What is asked for."""

    num_experts: int
    """Kept of each sparse layer."""
    by: By = "reap"
    merge: Merge | None = None
    """How the others are put into those that stay; None: they go."""
    curve: bool = False
    """Also measure 75, 50 and 25 % of the experts, with random ones and the wrong ones beside them."""
    seed: int = 0


@torch.no_grad()
def prune(
    source: Source,
    target: str | Path,
    asked: Pruning,
    sample: Sample | None = None,
    *,
    trace: Trace | None = None,
    to: str | None = None,
    dtype: torch.dtype | None = None,
    drop_extras: bool = False,
    max_shard_size: int = MAX_SHARD_SIZE,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a checkpoint (`open_checkpoint(path)`) with fewer experts and return the receipt.

    `sample`: rows to calibrate with and rows to measure on; None: nothing is run, so that `by` is `random`, or
    `frequency` or `gate` from a `trace`. `to` is a family (None: its own), `dtype` None: as stored.

    Raises `UserError` for packed weights, for a router that chooses otherwise than top-k, for too few experts and for a
    target that may not be written, `ConfigError` for what the family cannot say, `DataError` for a trace of another
    model, `CheckpointError` for tensors that have no place in what is written, `StorageError` if the disk refuses.
    """
    config = source.decoder("pruning")
    if source.packed is not None:
        raise UserError(f"{source.path} is packed: prune the original, then quantize that (rounding twice costs more)")
    small = fewer(config, asked.num_experts)
    if not drop_extras and (extra := next((name for name in source.kept if ".experts." in name), None)):
        raise CheckpointError(
            f"{source.files.where(source.logical[extra].parts[0])} is an expert of a part that is not computed with "
            "(MTP), whose number would no longer be the model's; leave that part out with --drop-extras"
        )
    family = to or source.family.model_type
    if problem := misfit(family_named(family, "--to"), small):  # before hours of running
        raise ConfigError(problem)
    given = _given(config, asked, sample, trace)
    arms, whole = _run(source, config, asked, sample, given, progress)
    groups = arms[0].groups
    changes = shrunk_tensors(source, groups)
    conversion = plan(source, small, changes, family, dtype, drop_extras=drop_extras)

    def finish(partial: Path) -> dict[str, Any]:
        found: dict[str, Any] = {
            "pruned": described(config, asked, groups, sample, trace),
            "measured": None,
            "curve": None,
        }
        if sample is None:
            return found
        ids, targets = sample.measured[:, :-1], sample.measured[:, 1:]
        nats = run_arms(ByLayer(open_source(partial), ids.shape[1]), [], ids[:0], ids, targets)
        size = bytes_of(source, targets)
        found["measured"] = {
            "text": sample.text or "random token ids",
            "tokens": targets.numel(),
            "before": figures(whole, targets.numel(), size),
            "after": figures(nats, targets.numel(), size),
        }
        if asked.curve:
            found["curve"] = points(arms, config, whole, targets.numel(), size)
        return found

    return write(
        target,
        conversion,
        changes,
        "experts kept, others put into them" if asked.merge else "experts kept",
        finish,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        progress=progress,
    )


def _given(
    config: ModelConfig, asked: Pruning, sample: Sample | None, trace: Trace | None
) -> Mapping[int, Tensor] | None:
    """Scores by layer that need no run; None: the sample gives them. Raises `UserError` where nothing does."""
    assert config.moe is not None
    E = config.moe.router.num_experts
    if trace is not None:
        if asked.merge:
            raise UserError("--merge compares experts on text: give --data, not --trace")
        return traced(trace, asked.by, config.sparse_layers, E)
    if asked.by == "random" and asked.merge is None:
        return {layer: torch.zeros(E) for layer in config.sparse_layers}  # chance decides
    if sample is None or not sample.calibration_rows:
        why = "--merge compares experts" if asked.by == "random" else f"--by {asked.by} looks at experts"
        raise UserError(f"{why} on text, and there is none to run; --trace or --by random need no text")
    return None


def _run(
    source: Source,
    config: ModelConfig,
    asked: Pruning,
    sample: Sample | None,
    given: Mapping[int, Tensor] | None,
    progress: Progress | None,
) -> tuple[list[Arm], float]:
    """The arms, the one that is written first, and the whole model's mean cross entropy."""
    chosen = Arm(asked.num_experts, "chosen", asked.by, asked.seed, asked.merge)
    if sample is None:  # no layer is even read
        assert given is not None and config.moe is not None
        if asked.curve:
            raise UserError("--curve measures on text, and there is none to run")
        chosen.groups = {layer: keep_by(chosen, layer, config.moe.router, score) for layer, score in given.items()}
        return [chosen], math.nan
    arms = [chosen, *(controls(config, chosen) if asked.curve else [])]
    rows, S = sample.calibration_rows, sample.ids.shape[1] - 1
    states = 4 * sample.ids.numel() * config.hidden_size * (len(arms) + 3)
    check_layer_fits(source, 2.0, states, "--no-measure with --trace or --by random writes without running it")
    calibration = sample.ids[: 0 if given else rows, :-1]
    ids, targets = sample.measured[:, :-1], sample.measured[:, 1:]
    return arms, run_arms(ByLayer(source, S), arms, calibration, ids, targets, given, progress)
