"""Which experts a text needs: from a recorded trace, by choices and by weights; the smallest set."""

from pathlib import Path

import numpy as np
import pytest
import torch

from manyhands.errors import DataError
from manyhands.trace.recording import Trace
from manyhands.trace.relevance import most_relevant, relevance, shares

from .traces import record


@pytest.mark.parametrize(
    ("found", "threshold", "expected"),
    [
        ([0.1, 0.4, 0.4, 0.1], 0.4, (1,)),  # of equals the lower number
        ([0.1, 0.4, 0.4, 0.1], 0.41, (1, 2)),
        ([0.25] * 4, 1.0, (0, 1, 2, 3)),
        ([1 / 3, 1 / 3, 1 / 3], 1.0, (0, 1, 2)),
        ([1.0, 0.0, 0.0], 0.2, (0,)),
        ([1.0, 0.0, 0.0], 1.0, (0,)),
        ([0.05] * 20, 0.2, (0, 1, 2, 3)),
    ],
)
def test_the_smallest_set(found: list[float], threshold: float, expected: tuple[int, ...]) -> None:
    assert most_relevant(found, threshold) == expected


def test_nothing_has_no_shares() -> None:
    assert shares([1, 3], "x").tolist() == [0.25, 0.75]
    with pytest.raises(DataError, match="layer 3: no token chose any expert"):
        shares([0.0, 0.0], "layer 3")


def test_relevance_of_a_recorded_trace(tmp_path: Path) -> None:
    """By hand, from the passes that were recorded."""
    passes = record(tmp_path / "t", recorded=("weights",))
    trace = Trace.open(tmp_path / "t")
    by_token, by_gate = relevance(trace, "token"), relevance(trace, "gate")
    for layer in (1, 3):
        ids = torch.cat([p[layer].expert_ids.flatten() for p in passes])
        weights = torch.cat([p[layer].weights.flatten() for p in passes]).double()
        counts, sums = (torch.bincount(ids, w, minlength=8).numpy() for w in (torch.ones_like(weights), weights))
        np.testing.assert_allclose(by_token[layer], counts / counts.sum(), rtol=1e-12)
        np.testing.assert_allclose(by_gate[layer], sums / sums.sum(), rtol=5e-4)  # they are recorded in 16 bits
        assert by_gate[layer].sum() == pytest.approx(1.0)


def test_by_gate_needs_weights(tmp_path: Path) -> None:
    record(tmp_path / "t", recorded=("kept",))
    with pytest.raises(DataError, match="has no weights, which relevance by gate is measured by: take token"):
        relevance(Trace.open(tmp_path / "t"), "gate")
