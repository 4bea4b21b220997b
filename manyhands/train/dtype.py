"""In which dtype a run computes: decided when it begins, written down, and kept."""

import torch

from manyhands.config import RunConfig
from manyhands.kernels.policy import bf16_trains_faster
from manyhands.train.state import pick_device


def settle_dtype(run: RunConfig, before: RunConfig | None) -> tuple[RunConfig, RunConfig | None]:
    """The run and what it was before (None: nothing) with `train.dtype` named, so that it is written down.

    `auto` is the dtype a run began with, whatever machine it goes on on; for a new one bfloat16 where that is faster:
    on CUDA, and on a CPU that `bf16_trains_faster` names. A file that still says `auto` is of a version that took
    float32 on every CPU.
    """
    device = pick_device(run.train.device)
    if before is not None:
        before = _with_dtype(before, _cuda_bf16(device))
        wanted = before.train.dtype if run.train.dtype == "auto" else run.train.dtype
        return run.model_copy(update={"train": run.train.model_copy(update={"dtype": wanted})}), before
    faster = bf16_trains_faster(run.model.hidden_size) if device.type == "cpu" else _cuda_bf16(device)
    return _with_dtype(run, faster), None


def _cuda_bf16(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_bf16_supported()


def _with_dtype(run: RunConfig, bf16: bool) -> RunConfig:
    if run.train.dtype != "auto":
        return run
    dtype = "bfloat16" if bf16 else "float32"
    return run.model_copy(update={"train": run.train.model_copy(update={"dtype": dtype})})
