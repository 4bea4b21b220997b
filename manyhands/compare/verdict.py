"""The verdict on a run: what its journal says went wrong, in plain words, each with a figure, a limit and a remedy.

A pure function of the records and of the run's description: the same for a run that ends now, for one that was killed,
and for one of an earlier version, of which less is known.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from manyhands.compare import alike, ending, learning, routers
from manyhands.compare.finding import Finding
from manyhands.compare.history import History
from manyhands.config import RunConfig
from manyhands.trace.series import Record

NOT_KEPT = 4
"""Exit code of a verb whose run is not worth keeping, as of a check that failed."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What there is to say of a run, the worst first."""

    findings: tuple[Finding, ...]

    @property
    def outcome(self) -> Literal["worth keeping", "too short to judge", "not worth keeping"]:
        """In three words: a fault speaks against it, and a run that is too short has shown nothing."""
        if any(finding.fault for finding in self.findings):
            return "not worth keeping"
        return "too short to judge" if any(found.kind == "short" for found in self.findings) else "worth keeping"

    def exit_code(self, strict: bool = False) -> int:
        """0, or 4 where a fault was found; with `strict` where anything was."""
        return NOT_KEPT if any(strict or finding.fault for finding in self.findings) else 0

    def lines(self) -> list[str]:
        """For a person: the outcome, and a line for each finding."""
        return [f"verdict: {self.outcome}", *(f"  {finding.line()}" for finding in self.findings)]

    def as_json(self) -> dict[str, Any]:
        """For a program: `outcome`, and `findings` with `kind`, `fault`, `says`, `figure`, `limit`, `remedy`."""
        return {"outcome": self.outcome, "findings": [asdict(finding) for finding in self.findings]}


def judge(records: Sequence[Record], run: RunConfig | None) -> Verdict:
    """The verdict on the run of these records (`read_journal`); `run` is its description, None if that is lost."""
    history = History.of(records, run)
    found = [*ending.findings(history), *learning.findings(history), *routers.findings(history)]
    found += alike.findings(history)
    return Verdict(tuple(sorted(found, key=lambda finding: not finding.fault)))
