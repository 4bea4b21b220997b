"""One thing that a verdict says."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """What happened, by which figure, and what would help."""

    kind: str
    """What it is, for programs: the names in docs/verdicts.md."""
    fault: bool
    """Whether the run is not worth keeping for it; else it is a remark."""
    says: str
    """A sentence without its full stop."""
    remedy: str
    figure: float | None = None
    limit: float | None = None
    """What `figure` was held against (limits.py)."""
    layer: int | None = None
    """The sparse layer it is about."""

    def line(self) -> str:
        """For a person."""
        return f"{'fault' if self.fault else 'remark'}: {self.says}: {self.remedy}"
