"""Which calls of the native library the check has really made: a fast path that never ran was not checked."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, cast
from typing import Any

from manyhands.check.report import Row, Situation
from manyhands.kernels import native
from manyhands.kernels.native import library
from manyhands.kernels.native.structs import CALLS, STEP_KINDS, CStep


@contextmanager
def counting() -> Iterator[Counter[str]]:
    """Calls of the native library inside the block, by name; the parts of a fused step as `mh_steps: route`."""
    calls: Counter[str] = Counter()
    original = library.call

    def counted(name: str, *arguments: Any) -> None:
        original(name, *arguments)
        calls[name] += 1
        if name == "mh_steps":
            steps = cast(arguments[0], POINTER(CStep))
            for i in range(int(arguments[1])):
                calls[f"mh_steps: {STEP_KINDS[steps[i].kind]}"] += 1

    library.call = counted
    try:
        yield calls
    finally:
        library.call = original


def expected() -> list[str]:
    """Every name that a full check must count at least once; none where the library is missing."""
    if not native.available():
        return []
    steps_only = {"mh_rope_and_cache", "mh_latent_rope_and_cache"}  # which decoding makes as parts of `mh_steps` only
    return [name for name in CALLS if name not in steps_only] + [f"mh_steps: {kind}" for kind in STEP_KINDS]


def coverage_row(calls: Counter[str]) -> Row:
    """Fails with the name of every fast path that did not run."""
    idle = tuple(name for name in expected() if not calls[name])
    worst = idle[0] if idle else "all of the native library"
    at = Situation("coverage", "all", "native", "–", "ran")
    return Row(at, "fast paths that ran", worst, float(len(idle)), 0.0, 1.0, idle)
