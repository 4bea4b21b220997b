"""Layouts of processes held against one: `manyhands check MODEL --layout 2x2,1x4`. Starts the processes itself.

W = dp × ep processes of this machine, joined by gloo; nothing of it needs torchrun, a port or a GPU.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from math import inf
from pathlib import Path
from typing import Any

from manyhands import strict_json
from manyhands.check.diagnosis import diagnose
from manyhands.check.report import CheckReport, Row, Situation
from manyhands.check.run import shrunk
from manyhands.config import BalanceConfig, BuiltConfig, RunConfig, TrainConfig
from manyhands.errors import ConfigError
from manyhands.train.together import check_together

MOST_PROCESSES = 16
LENGTH = 12
"""Tokens of a sequence."""
SECONDS = 600.0
"""After which a layout hangs."""

Progress = Callable[[str, int, int], None]


def parse_layouts(text: str) -> list[tuple[int, int]]:
    """`2x2,1x4` as (dp, ep) of each. Raises `ConfigError` for anything else, and for too many processes."""
    found = []
    for part in text.split(","):
        sizes = re.fullmatch(r"\s*([1-9]\d{0,2})x([1-9]\d{0,2})\s*", part)
        if sizes is None:
            raise ConfigError(f"--layout {text!r}: {part.strip()!r} is none: DPxEP, say 2x2 or 1x4,4x1")
        dp, ep = int(sizes[1]), int(sizes[2])
        if not 2 <= dp * ep <= MOST_PROCESSES:
            raise ConfigError(f"--layout {dp}x{ep} are {dp * ep} processes: 2 to {MOST_PROCESSES} can be checked here")
        found.append((dp, ep))
    return found


def run_layouts(
    config: BuiltConfig,
    balance: BalanceConfig,
    layouts: Sequence[tuple[int, int]],
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> CheckReport:
    """Train the shrunk `config` for three steps on each layout (dp, ep) and on one process, and compare everything.

    Raises `ConfigError` for experts that a layout cannot share out, and for what only one process can train. Whatever
    else goes wrong is a failed row.
    """
    started = time.perf_counter()
    small = shrunk(config)
    report = CheckReport(small, shrunk=small != config)
    for dp, ep in layouts:
        if ep > 1 and (small.moe is None or small.moe.router.num_experts % ep):
            number = 0 if small.moe is None else small.moe.router.num_experts
            raise ConfigError(
                f"--layout {dp}x{ep}: ep = {ep} does not divide the {number} experts of the checked model"
            )
        check_together(RunConfig(model=small, balance=balance, train=TrainConfig(sequence_length=LENGTH)), dp * ep)
    for done, (dp, ep) in enumerate(layouts):
        if progress is not None:
            progress(f"{dp}x{ep}: {dp * ep} processes", done, len(layouts))
        rows = _rows(small, balance, dp, ep, seed)
        report.rows += rows
        report.read += [f"{dp}x{ep}: {said}" for said in diagnose(rows, dp, ep)]
    if noisy_words := _noise(small):
        report.skipped.append(noisy_words)
    if progress is not None:
        progress("done", len(layouts), len(layouts))
    report.seconds = time.perf_counter() - started
    return report


def _noise(config: BuiltConfig) -> str | None:
    from manyhands.check.layouts import noisy  # which needs torch.distributed, half a second

    return "noise while training: each process draws its own, so it was off in both" if noisy(config) else None


def _rows(config: BuiltConfig, balance: BalanceConfig, dp: int, ep: int, seed: int) -> list[Row]:
    told = {
        "train": {"sequence_length": LENGTH},
        "model": config.model_dump(mode="json"),
        "balance": balance.model_dump(mode="json"),
        "ep": ep,
        "seed": seed,
    }
    with tempfile.TemporaryDirectory() as folder:
        failed = _run(Path(folder), dp * ep, json.dumps(told))
        if failed is None:
            return [row_of(values) for values in strict_json.loads((Path(folder) / "out-0").read_bytes())]
    at = Situation("layout", f"{dp}x{ep}", "eager", "float64", "–")
    return [Row(at, "ran without an error", failed, inf, 0.0, 1.0, (failed,))]


def _run(folder: Path, size: int, told: str) -> str | None:
    """Start the processes and wait for all; what the first to fail said, None if none did."""
    (folder / "told").write_text(told, encoding="utf-8")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes: list[subprocess.Popen[bytes]] = []
    ends = time.monotonic() + SECONDS
    try:
        for rank in range(size):
            with (
                open(folder / "told", "rb") as said,
                open(folder / f"out-{rank}", "wb") as out,
                open(folder / f"error-{rank}", "wb") as error,
            ):
                command = [sys.executable, "-m", "manyhands.check.layout_process", str(folder), str(rank), str(size)]
                processes.append(subprocess.Popen(command, stdin=said, stdout=out, stderr=error, env=environment))
        while None in (codes := [process.poll() for process in processes]) and not any(codes):
            if time.monotonic() > ends:
                return f"no end after {SECONDS:g} s"
            time.sleep(0.02)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    failed = next((rank for rank, code in enumerate(codes) if code), None)
    if failed is None:
        return None
    lines = (folder / f"error-{failed}").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"process {failed}: {lines[-1][:300] if lines else f'ended with code {codes[failed]}'}"


def plain(row: Row) -> dict[str, Any]:
    """As JSON has it; what is not finite is null."""
    numbers = {name: getattr(row, name) if abs(getattr(row, name)) < inf else None for name in ("error", "ratio")}
    situation = {name: getattr(row.situation, name) for name in Situation.__slots__}
    return {
        "situation": situation,
        "quantity": row.quantity,
        "worst": row.worst,
        "limit": row.limit,
        "failing": list(row.failing),
        **numbers,
    }


def row_of(values: dict[str, Any]) -> Row:
    """The row of `plain`."""
    error, ratio = (inf if values[name] is None else values[name] for name in ("error", "ratio"))
    at, named = Situation(**values["situation"]), tuple(values["failing"])
    return Row(at, values["quantity"], values["worst"], error, values["limit"], ratio, named)
