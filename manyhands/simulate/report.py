"""A simulation as a whole: from the trace and what was asked to all that is printed, drawn and written as JSON."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from manyhands.errors import DataError, UserError
from manyhands.simulate.replay import Tally
from manyhands.simulate.sweep import Row, budgets_in_cycles, speed, sweep
from manyhands.simulate.tokens import Tokens, record_sizes
from manyhands.simulate.union import Union, union_curve
from manyhands.simulate.wants import Wants
from manyhands.trace.counts import expert_counts
from manyhands.trace.foreign import opened
from manyhands.trace.recording import Manifest

_MOST_EXPERTS = 1 << 20


@dataclass(frozen=True)
class Settings:
    """What is asked.

    budgets       bytes, or a share of all experts (0 < share <= 1); none: from a quarter of T by doubling.
    disks         bytes per second of each disk to forecast for.
    memory        bytes per second of memory; None: its time is left out.
    sequences     texts decoded together; 0: the forward passes that were recorded.
    max_tokens    the first so many of the trace; None: all.
    record_bytes  of one expert, where the trace does not say.
    pin           the trace that `pinned` counts in; None: the replayed one.
    """

    policies: Sequence[str] = ("lfu", "lru", "pinned", "belady")
    budgets: Sequence[int | float] = ()
    disks: Sequence[float] = ()
    memory: float | None = None
    sequences: int = 0
    max_tokens: int | None = None
    record_bytes: int | None = None
    pin: Path | None = None


@dataclass(frozen=True)
class Report:
    """What came of it. `cut`: the sequences are pieces of fewer texts, which share more than different texts do."""

    name: str
    manifest: Manifest
    settings: Settings
    recorded_tokens: int
    replayed_tokens: int
    cut: bool
    cycle_bytes: int
    all_bytes: int
    rows: list[Row]
    union: list[Union]

    @property
    def decoded(self) -> bool:
        """Whether policies are compared by decoded tokens."""
        return bool(self.rows and self.rows[0].result.decode.tokens)

    @property
    def dense_bytes(self) -> int:
        """What each forward pass reads besides experts, as far as the trace says."""
        return self.manifest.dense_bytes or 0

    def described(self) -> dict[str, Any]:
        """For JSON."""
        m, s = self.manifest, self.settings
        return {
            "trace": self.name,
            "layers": len(m.layers),
            "num_experts": m.num_experts,
            "num_experts_per_tok": m.num_experts_per_tok,
            "recorded_tokens": self.recorded_tokens,
            "replayed_tokens": self.replayed_tokens,
            "sequences": s.sequences,
            "pieces_of_the_same_texts": self.cut,
            "pinned_from": str(s.pin) if s.pin else "the same trace",
            "cycle_bytes": self.cycle_bytes,
            "all_bytes": self.all_bytes,
            "dense_bytes": m.dense_bytes,
            "memory_rate": s.memory,
            "union": [vars(one) for one in self.union],
            "rows": [self._row(row) for row in self.rows],
        }

    def _row(self, row: Row) -> dict[str, Any]:
        return {
            "policy": row.policy,
            "budget_bytes": row.budget_bytes,
            "budget_cycles": row.budget_bytes / self.cycle_bytes,
            "of_belady": row.of_belady,
            "all": _tally(row.result.all),
            "decode": _tally(row.result.decode) if self.decoded else None,
            "speed": [
                {"disk": disk, **{name: value if isfinite(value) else None for name, value in vars(at).items()}}
                for disk in self.settings.disks
                for at in [speed(row.tally, disk, self.settings.memory, self.dense_bytes)]
            ],
        }


def simulated(
    path: Path, settings: Settings, progress: Callable[[int, int], None] = lambda done, total: None
) -> Report:
    """Replay the trace at `path` (ours, or another engine's file).

    Raises `UserError` for settings that do not fit the trace and `DataError` for one that cannot be read.
    """
    with opened(path) as trace:
        manifest, recorded = trace.manifest, len(trace)
        if len(manifest.layers) * manifest.num_experts > _MOST_EXPERTS:  # what is kept for each, without a token of it
            raise DataError(
                f"{path}: {len(manifest.layers):,} layers of {manifest.num_experts:,} experts; "
                f"a simulation takes {_MOST_EXPERTS:,} experts in all"
            )
        sizes = record_sizes(manifest, settings.record_bytes)
        tokens = Tokens.of(trace, settings.max_tokens)
        counts = expert_counts(trace).tolist() if "pinned" in settings.policies and settings.pin is None else None
    if "pinned" in settings.policies and settings.pin is not None:
        with opened(settings.pin) as other:
            shape = (other.manifest.layers, other.manifest.num_experts)
            if shape != (manifest.layers, manifest.num_experts):
                raise UserError(
                    f"--pin {settings.pin}: {len(shape[0])} layers of {shape[1]} experts, "
                    f"{path} has {len(manifest.layers)} of {manifest.num_experts}"
                )
            counts = expert_counts(other).tolist()
    cut = False
    union = union_curve(tokens, sizes, manifest.num_experts)
    if settings.sequences:
        merged = tokens.merged(settings.sequences)
        tokens, cut = merged.tokens, merged.cut
    wants = Wants.of(tokens, sizes)
    cycle, every = manifest.num_experts_per_tok * sum(sizes), manifest.num_experts * sum(sizes)
    budgets = [
        size if isinstance(size, int) else round(size * every)
        for size in settings.budgets or budgets_in_cycles(wants, cycle, manifest.num_experts)
    ]
    rows = sweep(wants, settings.policies, budgets, counts, progress)
    return Report(path.name, manifest, settings, recorded, len(tokens), cut, cycle, every, rows, union)


def _tally(tally: Tally) -> dict[str, Any]:
    return {
        **vars(tally),
        "hit_rate": tally.hit_rate,
        "bytes_per_token": tally.bytes_per_token,
        "experts_per_step": tally.experts_per_step,
    }


_SHARE = re.compile(r"(\d{1,3}(?:\.\d{1,6})?)\s*%")


def share(text: str) -> float | None:
    """10% as 0.1; None for what is not a percentage above 0 and up to 100."""
    found = _SHARE.fullmatch(text.strip())
    value = float(found[1]) / 100 if found else 0.0
    return value if 0 < value <= 1 else None
