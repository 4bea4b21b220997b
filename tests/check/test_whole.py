"""What `manyhands check tiny` does, one job of each kind: green, and every fast path ran."""

import manyhands.check.run
from manyhands.check import ROUTERS, run_check
from manyhands.check.attentions import ATTENTIONS
from manyhands.check.coverage import expected
from manyhands.config.load import load_preset
from manyhands.kernels import native
from manyhands.kernels.native.structs import STEP_KINDS


def _kind(what: str, backend: str) -> tuple[str, ...]:
    """Jobs of one kind do the same with other numbers, in this file's neighbours: routers, attentions, models."""
    name, _, case = what.rpartition(", ")
    if name in ROUTERS or case == "one_expert" or name == "5000 tokens":
        return "layer", backend
    if what in ATTENTIONS:
        return "attention", "latent" if "latent" in what else "plain"
    if what.startswith("edited, "):
        return "edited", "plain" if backend == "plain" else "packed"
    if what.startswith("decoding, "):
        kind = "model" if what == "decoding, model" else "latent" if "latent" in what else "small"
        return "decoding", kind, "plain" if backend == "plain" else "packed"
    return what, backend


def test_the_whole_check_is_green(monkeypatch) -> None:
    do, kinds = manyhands.check.run._do, set()

    def thinned(report, jobs, *rest):
        first: dict[tuple[str, ...], tuple] = {}
        for job in jobs:
            first.setdefault(_kind(*job[:2]), job)
        kinds.update(first)
        do(report, list(first.values()), *rest)

    monkeypatch.setattr(manyhands.check.run, "_do", thinned)
    run = load_preset("tiny", [])
    report = run_check(run.model, run.balance, cases=("random",))
    assert report.ok, "\n".join(row.line() for row in report.failures)
    wanted = {"layer", "attention", "decoding", "edited", "routing of few tokens", "loss head"}
    assert {kind[0] for kind in kinds} >= wanted
    if not native.available():
        return
    assert {row.quantity for row in report.rows if row.situation.scope == "coverage"} == {"fast paths that ran"}
    assert set(expected()) >= {f"mh_steps: {kind}" for kind in STEP_KINDS}
    assert all(report.calls[name] for name in expected())
