"""The lab's encoder-decoders: equal FLOPs mean equal, and the sizes that are printed are the built model's."""

from pathlib import Path

import pytest

from manyhands.lab.curves import Ratio
from manyhands.lab.job import Job
from manyhands.lab.rewriting import arm, equal_width, switch, t5
from manyhands.lab.sooner import at, ratio_figures
from manyhands.models import build
from manyhands.train.state import count_parameters


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize(("E", "K", "F"), [(16, 1, 56), (64, 1, 120), (8, 2, 24)])
def test_equal_flops(tmp_path: Path, quick: bool, E: int, K: int, F: int) -> None:
    job = Job(quick=quick, seeds=(0,), scratch=tmp_path)
    dense = t5(job, 10, 5, f"model.intermediate_size={equal_width(E, K, F)}")
    sparse = switch(dense, E, K, F, 1.25)
    one, other = arm(dense, "T5"), arm(sparse, "Switch")
    assert one.flops == other.flops and one.active == other.active
    for run, described in ((dense, one), (sparse, other)):
        total, active = count_parameters(build(run.model))
        tables = 2 * 32 * run.model.num_attention_heads  # type: ignore[union-attr]
        assert (total, active - tables) == (described.parameters, described.active)
    assert len(sparse.model.sparse_layers) == 4 and sparse.train.max_steps == (5 if quick else 10)


def test_where_a_ratio_is_read() -> None:
    found = [Ratio(5.0 - step, step, step / 2, 2 * step, step) for step in (10, 20, 30)]
    assert [at(found, step).slow_step for step in (1, 10, 29, 30, 99)] == [10, 10, 20, 30, 30]
    figures = ratio_figures([found, found[:1]], 30, "T5")
    assert [figure.values for figure in figures[-2:]] == [(2.0, 2.0), (2.0, 2.0)]
    assert figures[0].name == "at the T5 loss of step 6: by steps"
