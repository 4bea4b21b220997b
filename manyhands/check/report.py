"""What a check found: one row per quantity, situation, backend and dtype."""

from dataclasses import asdict, dataclass, field
from typing import Any

from manyhands.config import BuiltConfig
from manyhands.errors import CheckFailed

SCHEMA = "manyhands.check/1"


@dataclass(frozen=True, slots=True)
class Situation:
    """Where a comparison was made."""

    scope: str
    """`model`, or the name of a router checked by itself in one layer."""
    case: str
    """Routing case, see `cases.py`."""
    backend: str
    dtype: str
    mode: str
    """`plain`, `recompute` or `accumulate`: the training step. `forward`: masked batch, every balance loss by itself.
    `train` or `eval`: one layer."""


@dataclass(frozen=True, slots=True)
class Row:
    """One quantity held against the oracle."""

    situation: Situation
    quantity: str
    worst: str
    """Full name of the tensor that differs most."""
    error: float
    """Its error; what is measured depends on the dtype, see `compare.py`. Exact quantities: the largest difference."""
    limit: float
    """The largest error that passes; 0 for what must be exact."""
    ratio: float
    """‖tested‖ / ‖oracle‖ of the worst tensor."""
    failing: tuple[str, ...] = ()
    """Full names of all tensors above the limit."""

    @property
    def ok(self) -> bool:
        """Whether every tensor passed."""
        return not self.failing

    def line(self) -> str:
        """The row as one line of text."""
        s = self.situation
        named = self.failing or (self.worst,)
        more = f" and {len(named) - 4} more" if len(named) > 4 else ""
        return (
            f"{self.quantity}: {', '.join(named[:4])}{more}: error {self.error:.2e} (limit {self.limit:.1e}), "
            f"ratio {self.ratio:.4g} [{s.scope}, {s.case}, {s.backend}, {s.dtype}, {s.mode}]"
        )


@dataclass(slots=True)
class CheckReport:
    """All rows, and what was checked."""

    config: BuiltConfig
    """The model that was checked, after shrinking."""
    shrunk: bool
    rows: list[Row] = field(default_factory=list)
    flips: dict[str, int] = field(default_factory=dict)
    """Per dtype: tokens whose experts differ from the oracle's by no more than rounding."""
    routed: dict[str, int] = field(default_factory=dict)
    """Per dtype: tokens routed, over all rows."""
    read: list[str] = field(default_factory=list)
    """What of a checkpoint was read: layers, experts, share of the bytes."""
    skipped: list[str] = field(default_factory=list)
    """What could not be checked, and why."""
    seconds: float = 0.0
    calls: dict[str, int] = field(default_factory=dict)
    """How often each function of the native library ran; `mh_steps: …` are the parts of fused steps."""

    @property
    def failures(self) -> list[Row]:
        """The rows that failed."""
        return [row for row in self.rows if not row.ok]

    @property
    def ok(self) -> bool:
        """Whether anything was checked and every row passed."""
        return bool(self.rows) and not self.failures

    def worst_gradient(self) -> Row | None:
        """The gradient row nearest to, or furthest above, its limit."""
        rows = [row for row in self.rows if row.quantity == "gradients"]
        return max(rows, key=lambda row: row.error / row.limit, default=None)

    def raise_if_failed(self) -> None:
        """Raise `CheckFailed` (exit code 4) naming the first failure, if there is one."""
        if self.ok:
            return
        failures = self.failures
        first = failures[0].line() if failures else "nothing was checked"
        raise CheckFailed(f"{len(failures)} of {len(self.rows)} comparisons failed; first: {first}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `--json`. Infinite errors become the string "inf"."""
        rows = []
        for row in self.rows:
            plain = asdict(row) | {"ok": row.ok}
            plain |= plain.pop("situation")
            for name in ("error", "ratio"):
                plain[name] = plain[name] if abs(plain[name]) < float("inf") else "inf"
            rows.append(plain)
        return {
            "schema": SCHEMA,
            "ok": self.ok,
            "shrunk": self.shrunk,
            "config": self.config.model_dump(mode="json"),
            "compared": len(self.rows),
            "failed": len(self.failures),
            "flips": self.flips,
            "routed": self.routed,
            "read": self.read,
            "skipped": self.skipped,
            "native_calls": self.calls,
            "seconds": self.seconds,
            "rows": rows,
        }
