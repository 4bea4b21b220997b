"""Every experiment at its quick size: it runs, it can be read, and what it is to show points the right way."""

import json

import pytest

from manyhands.kernels import BACKENDS
from manyhands.lab.page import render
from manyhands.lab.registry import describe, names
from manyhands.lab.run import run_experiment
from manyhands.lab.show import lines


@pytest.mark.parametrize("name", names())
def test_the_direction_holds(name: str) -> None:
    if name == "disk" and (missing := BACKENDS["native"].missing()):
        pytest.skip(missing)
    result = run_experiment(name, quick=True)
    text = "\n".join(lines(result))
    assert result.outcome.passed, text
    assert result.outcome.arms and result.outcome.criteria
    assert describe(name).question in text and result.verdict in text
    json.dumps(result.described(), allow_nan=False)
    page = render([result])
    assert "<svg" in page and "src=" not in page and 'href="http' not in page
