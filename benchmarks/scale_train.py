"""For `scale.py`: a run under torchrun with a clock and a counter around every exchange of tokens, and its forecast."""

import json
import math
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from manyhands.cli.main import main as command_line
from manyhands.config.load import parse_run
from manyhands.config.parallel import Layout
from manyhands.moe import Experts
from manyhands.parallel.shards import local
from manyhands.plan.count import count_model
from manyhands.plan.host import usable_cores
from manyhands.plan.network import Network
from manyhands.simulate.exchange import Way
from manyhands.simulate.parallel import Settings, laid_out
from manyhands.strict_json import loads
from manyhands.train import loop

D, LAYERS, E, K, F, B, S = 256, 4, 16, 4, 256, 16, 128
WORDS = ("hands", "work", "light", "many", "expert", "router", "token", "layer", "load", "step", "batch", "mesh", "dp")
Start = Callable[[int, dict[str, Any], Path], Path]
WARM = 3
"""Steps that are left out."""
CALLS = {"by_pairs": 2, "by_tokens": 4}
"""Exchanges of a layer's forward pass, of which the first takes rows to their experts."""
COLLECTIVES = {"by_pairs": 3 + 2, "by_tokens": 5 + 3}
"""Of a layer, forward and backward: how many rows come, rows, weights, ids, results; gradients of all but ids."""
RUN = f"""
model:
  vocab_size: 512
  hidden_size: {D}
  num_hidden_layers: {LAYERS}
  max_position_embeddings: {S}
  attention: {{num_attention_heads: 4, head_dim: {D // 4}}}
  moe:
    moe_intermediate_size: {F}
    router: {{num_experts: {E}, num_experts_per_tok: {K}}}
optim: {{name: adamw}}
train: {{sequence_length: {S}, batch_size: {B}, dtype: float32, device: cpu}}
"""


@dataclass
class Trained:
    """A run on so many processes: of its steps after the first ones, medians."""

    ranks: int
    tokens: int
    """Of a step."""
    step: float
    """Seconds."""
    exchange: float
    """Seconds of a step in exchanges of tokens, waiting for the slowest rank included; the mean rank's."""
    moved: float
    """Bytes of a step that a rank sends to others in exchanges, forward and backward; the mean rank's."""
    rows: int
    """Rows that all ranks sent to others on their way out in the step that the trace has, all layers."""
    experts: int
    """Bytes of experts' weights on a rank."""
    peak: int
    """Bytes of memory that the largest process had at most."""
    trace: Path = field(repr=False)
    """Of one step."""


@dataclass
class Spent:
    """What a process did since the step began."""

    seconds: float = 0.0
    bytes: int = 0
    rows: list[int] = field(default_factory=list)
    experts: dict[int, int] = field(default_factory=dict)


def prepared(folder: Path) -> Path:
    """A text with something to learn in it."""
    lines = (f"{WORDS[i % 7]} {WORDS[i * 5 % 11]} {i % 97} {WORDS[i // 5 % 13]}" for i in range(40_000))
    path = folder / "text.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


def train(
    ranks: int,
    together: Callable[[int, dict[str, Any], Path], Path],
    folder: Path,
    text: Path,
    steps: int,
    dispatch: str,
) -> Trained:
    """`manyhands train` on so many processes."""
    run, out = folder / "run.yaml", folder / f"on-{ranks}"
    run.write_text(RUN)
    changes = [f"data.sources=['{text}']", f"train.max_steps={steps}", f"trace.every={steps}", "train.log_every=1"]
    changes += [f"parallel.ep={ranks}", f"parallel.dispatch={dispatch}"]
    arguments = ["train", "--config", str(run), "--out", str(out), "--quiet", *changes]
    together(ranks, {"arguments": arguments, "found": str(out), "dispatch": dispatch}, folder)
    found = [json.loads(Path(f"{out}.{rank}.json").read_text()) for rank in range(ranks)]
    records = [loads(line) for line in (out / "journal.jsonl").read_text().splitlines()]
    speeds = [record["tokens_per_s"] for record in records if record.get("tokens_per_s") and record["step"] > WARM]
    tokens = B * S
    return Trained(
        ranks,
        tokens,
        tokens / statistics.median(speeds),
        statistics.mean(one["seconds"] for one in found),
        statistics.mean(one["bytes"] for one in found),
        sum(one["rows"] for one in found),
        max(one["experts"] for one in found),
        max(one["peak"] for one in found),
        next((out / "traces").iterdir()),
    )


def forecast(one: Trained, here: Trained, network: Network, dispatch: str) -> dict[str, float]:
    """Of a step on `here.ranks` processes: one process's arithmetic on as many cores as there are, the exchanges of
    its trace, and the weights and gradients of all but experts, gathered twice and scattered once in float32.
    """
    R = here.ranks
    rows = _counted(one.trace, R, dispatch).waited(network.duplex).sum()
    each = 4 * D * 4 + (0 if dispatch == "by_pairs" else K * (4 + 8 + 4))
    exchanged = network.seconds(rows * each, COLLECTIVES[dispatch] * LAYERS)
    counts = count_model(parse_run(RUN, "benchmarks/scale.py").model)
    others = counts.total - counts.by_component["routed experts"]
    gathered = network.seconds(3 * 4 * others * (R - 1) / R, 3 * (2 * LAYERS + 1))
    step = one.step / min(R, usable_cores()) + exchanged + gathered
    return {
        "step": step,
        "exchange": exchanged,
        "gathering": gathered,
        "rows": float(_counted(here.trace, R, dispatch).remote_L.sum()),
    }


def _counted(trace: Path, ranks: int, dispatch: str) -> Way:
    found = laid_out(trace, Settings(Layout(1, ranks))).exchange
    assert found.passes == 1
    return found.by_pairs if dispatch == "by_pairs" else found.by_tokens


def train_as_told(asked: dict[str, Any]) -> None:
    """What one process does: the command line, with a clock around every exchange."""
    steps: list[Spent] = [Spent()]
    _watch(steps)
    sys.argv = ["manyhands", *asked["arguments"]]
    code: Any = 0
    try:
        command_line()
    except SystemExit as left:
        code = left.code
    measured = [step for step in steps if step.seconds or step.experts][WARM:] or steps
    found = {
        "seconds": statistics.median(step.seconds for step in measured),
        "bytes": statistics.median(step.bytes for step in measured),
        "rows": sum(measured[-1].rows[: CALLS[asked["dispatch"]] * LAYERS : CALLS[asked["dispatch"]]]),
        "experts": sum(measured[-1].experts.values()),
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    Path(f"{asked['found']}.{os.environ['RANK']}.json").write_text(json.dumps(found))
    sys.exit(code)


def _watch(steps: list[Spent]) -> None:
    """Count what goes through all-to-alls, which only the exchange of tokens uses here: a `Spent` for each step."""
    real, real_forward, real_step = dist.all_to_all_single, Experts.forward, loop.train_step

    def timed(arriving: Tensor, rows: Tensor, *splits: list[int], group: Any, async_op: bool = False) -> Any:
        began = time.perf_counter()
        work = real(arriving, rows, *splits, group=group, async_op=async_op)
        spent = steps[-1]
        spent.seconds += time.perf_counter() - began
        if splits:  # without, it is how many rows come
            away = sum(splits[1]) - splits[1][group.rank()]
            spent.bytes += away * rows.element_size() * math.prod(rows.shape[1:])
            spent.rows.append(away)
        return work if work is None else _Waiting(work, steps)

    def forward(self: Experts, *args: Any, **options: Any) -> Tensor:
        steps[-1].experts[id(self)] = sum(local(p.detach()).nbytes for p in self.parameters())
        return real_forward(self, *args, **options)

    def step(*args: Any, **options: Any) -> Any:
        steps.append(Spent())
        return real_step(*args, **options)

    dist.all_to_all_single = timed
    Experts.forward = forward  # type: ignore[method-assign]
    loop.train_step = step


class _Waiting:
    """An exchange under way, with a clock around the wait for it."""

    def __init__(self, work: Any, steps: list[Spent]) -> None:
        self._work, self._steps = work, steps

    def wait(self) -> Any:
        began = time.perf_counter()
        found = self._work.wait()
        self._steps[-1].seconds += time.perf_counter() - began
        return found
