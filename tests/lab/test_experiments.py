"""Experiments at their quick size: they run, can be read, and what they are to show points the right way.

Those that train decoders as others here do are left to `manyhands lab run --all --quick` (CONTRIBUTING.md), for time.
"""

import json
from functools import partial

import pytest
import torch.multiprocessing

from manyhands.kernels import BACKENDS
from manyhands.lab.page import render
from manyhands.lab.registry import describe, names
from manyhands.lab.run import run_experiment
from manyhands.lab.show import lines
from manyhands.train import finish

ALIKE = {
    "balance-strength",
    "capacity-factor",
    "fine-tune",
    "fine-tune-parts",
    "router",
    "scaling",
    "shared-expert",
    "stability",
    "top-k",
}
"""Arms of decoders side by side, as `collapse`, `capacity` and `time-to-quality` have them."""


@pytest.mark.parametrize("name", [name for name in names() if name not in ALIKE])
def test_the_direction_holds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forked = partial(torch.multiprocessing.start_processes, start_method="forkserver")
    monkeypatch.setattr(torch.multiprocessing, "spawn", forked)  # processes that have imported torch
    if name == "disk" and (missing := BACKENDS["native"].missing()):
        pytest.skip(missing)
    monkeypatch.setattr(finish, "token_shares", lambda *args: (None, None))  # of each run's report, which no one reads
    monkeypatch.setattr(finish, "write_report", lambda *args: None)
    result = run_experiment(name, quick=True)
    text = "\n".join(lines(result))
    assert result.outcome.passed, text
    assert result.outcome.arms and result.outcome.criteria
    assert describe(name).question in text and result.verdict in text
    json.dumps(result.described(), allow_nan=False)
    page = render([result])
    assert "<svg" in page and "src=" not in page and 'href="http' not in page
