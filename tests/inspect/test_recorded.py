"""A trace as what is measured: sequence by sequence, whatever order its tokens ran in."""

from pathlib import Path

import numpy as np
import pytest

from manyhands.errors import DataError
from manyhands.inspect.recorded import from_trace, is_trace
from manyhands.trace.recording import Phase, Recorder, Trace


def test_sequences_that_ran_together_are_set_one_behind_the_other(tmp_path: Path) -> None:
    ids = np.arange(24).reshape(6, 2, 2) % 8
    ids[5, 1] = -1
    with Recorder(tmp_path / "t", layers=(1, 3), num_experts=8, num_experts_per_tok=2, recorded=()) as recorder:
        for step in range(3):
            recorder.add_arrays(
                *(ids[2 * step : 2 * step + 2],),
                token_ids=[10 + step, 20 + step],
                sequence=[7, 2],
                position=step,
                phase=Phase.DECODE,
                step=step,
            )
    assert is_trace(tmp_path / "t") and not is_trace(tmp_path)
    seen = from_trace(Trace.open(tmp_path / "t"), 100)
    assert seen.layers == (1, 3) and seen.token_ids.tolist() == [20, 21, 22, 10, 11, 12]
    assert seen.sequence.tolist() == [0, 0, 0, 1, 1, 1]
    assert (seen.expert_ids == ids[[1, 3, 5, 0, 2, 4]]).all()
    assert len(from_trace(Trace.open(tmp_path / "t"), 4)) == 4


def test_long_sequences_are_cut_into_texts_for_intervals(tmp_path: Path) -> None:
    with Recorder(tmp_path / "t", layers=(0,), num_experts=8, num_experts_per_tok=1, recorded=()) as recorder:
        recorder.add_arrays(
            np.zeros((300, 1, 1), int), sequence=0, position=np.arange(300), phase=Phase.PREFILL, step=0
        )
    assert np.bincount(from_trace(Trace.open(tmp_path / "t"), 1000).text).tolist() == [128, 128, 44]


def test_an_empty_trace(tmp_path: Path) -> None:
    Recorder(tmp_path / "t", layers=(0,), num_experts=8, num_experts_per_tok=1, recorded=()).close()
    with pytest.raises(DataError, match="holds no token"):
        from_trace(Trace.open(tmp_path / "t"), 10)
