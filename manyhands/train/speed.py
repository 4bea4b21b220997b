"""How much of this machine a run uses: the model's operations per second, beside its measured rate; and memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from manyhands.config import ModelConfig, RunConfig
from manyhands.format import show
from manyhands.parallel.ranks import Ranks
from manyhands.plan.compute import training_flops
from manyhands.plan.count import count_model
from manyhands.plan.host import peak_memory
from manyhands.plan.remember import remembered
from manyhands.plan.sizes import sizes_of

_RATES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass(frozen=True, slots=True)
class Speed:
    """What turns tokens per second into a share of the machine."""

    flops_per_token: float | None
    """Forward and backward, by the planner's count; None where not all is trained, or by other kinds."""
    rate: float | None
    """FLOP/s of a matrix product in this precision on all devices together, as `manyhands doctor` measured it; None: it
    has not."""
    device: torch.device

    @staticmethod
    def of(run: RunConfig, dtype: torch.dtype, device: torch.device, ranks: Ranks) -> "Speed":
        """For this run on these ranks, on machines that are like this one."""
        each = None
        if isinstance(run.model, ModelConfig) and run.tune is None and run.trainable == ("*",):
            each = training_flops(sizes_of(run.model), count_model(run.model), run.train.sequence_length)
        here, name = remembered(), _RATES.get(dtype)
        if here is None or name is None:
            return Speed(each, None, device)
        machine = here.machine if device.type == "cuda" else here.processor
        rate = machine.rates.get(name)
        devices = ranks.size if device.type == "cuda" else max(1, ranks.size // ranks.local_size)
        return Speed(each, None if rate is None else rate * devices, device)

    def figures(self, tokens_per_s: float) -> dict[str, Any]:
        """Fields of a `step` record. Memory is rank 0's, its device's or else its process's, the most it has had."""
        flops = None if self.flops_per_token is None else self.flops_per_token * tokens_per_s
        used = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else peak_memory()
        mfu = None if flops is None or self.rate is None else flops / self.rate
        return {"flops_per_s": flops, "mfu": mfu, "peak_memory": used or None}


def used(steps: Sequence[Mapping[str, Any]]) -> str | None:
    """The same of a run's `step` records for a person: medians, and the most memory; None where they have neither."""
    flops = [step["flops_per_s"] for step in steps if step.get("flops_per_s")]
    shares = [step["mfu"] for step in steps if step.get("mfu")]
    memory = max((step.get("peak_memory") or 0 for step in steps), default=0)
    parts = []
    if flops:
        known = f"{median(shares):.1%} of this machine's measured matrix rate" if shares else None
        rate = show(float(median(flops)), "FLOP/s")
        parts.append(f"{rate}, {known}" if known else f"{rate} (what the machine could: manyhands doctor)")
    if memory:
        parts.append(f"peak memory {show(float(memory), 'B')}")
    return "; ".join(parts) or None
