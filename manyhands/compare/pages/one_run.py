"""The page of a past run, from what is left of it."""

from pathlib import Path

from manyhands.compare.read import PastRun
from manyhands.compare.verdict import Verdict
from manyhands.errors import DataError
from manyhands.files import PREPARED, check_replaceable
from manyhands.strict_json import read_object
from manyhands.trace.report import write_report

PAGE = "report.html"
_OURS = b"Made by manyhands"
_RICHER = "<h2>What each expert takes</h2>"
"""What only a run that has its model can draw."""


def write_page(past: PastRun, path: Path, out: Path | None, verdict: Verdict) -> Path | None:
    """Write `out`, or `report.html` in the run's directory; None where that has what would be lost, and stays.

    Raises `UserError` for a file that this program did not make, `StorageError` if the disk refuses.
    """
    folder = path if path.is_dir() else path.parent
    page = out or folder / PAGE
    check_replaceable(page, _OURS)
    if out is None and page.is_file() and _RICHER in page.read_text(encoding="utf-8", errors="replace"):
        return None
    extra = {"compressors": _compressors(folder)}
    write_report(
        page, past.records, past.run, extra=extra, verdict=verdict.as_json(), name=past.name, problem=past.problem
    )
    return page


def _compressors(folder: Path) -> dict[str, float]:
    """What compressors reach on the validation text, where the run's data are there."""
    try:
        reached = read_object(folder / "data" / PREPARED, 1 << 20, DataError)["compressors"]
        return {str(name): float(value) for name, value in reached.items()}
    except (OSError, DataError, KeyError, TypeError, ValueError, AttributeError):
        return {}
