"""Quantising: what is refused, and what a sample changes."""

import pytest
import torch

from manyhands.checkpoint.model import load_model
from manyhands.checkpoint.source import open_source
from manyhands.config import PackedConfig, Packing
from manyhands.errors import CheckpointError, UserError
from manyhands.quantize.quantize import quantize
from manyhands.quantize.receipt import Sample

from ..checkpoint.hostile import make

PACKED = PackedConfig(experts=Packing(format="int4", group_size=32), linear=Packing(format="int8"))
IDS = torch.randint(0, 270, (2, 24), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    return make(tmp_path_factory.mktemp("source") / "mixtral", family="mixtral", initializer_range=0.3)


def test_nothing_is_packed_twice(mixtral, tmp_path):
    quantize(open_source(mixtral), tmp_path / "once", PACKED, Sample(IDS, None))
    with pytest.raises(UserError, match="packed already"):
        quantize(open_source(tmp_path / "once"), tmp_path / "twice", PACKED, Sample(IDS, None))
    assert not (tmp_path / "twice").exists()


def test_weights_that_are_not_finite_are_named(mixtral, tmp_path):
    model = load_model(mixtral)
    with torch.no_grad():
        model.layers[1].self_attn.k_proj.weight[3, 3] = torch.nan
    model.save(tmp_path / "nan")
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.k_proj\.weight: int8 cannot hold"):
        quantize(open_source(tmp_path / "nan"), tmp_path / "target", PACKED, Sample(IDS, None))
    assert not (tmp_path / "target").exists()


def test_importance_lowers_the_error_that_matters(mixtral, tmp_path):
    ids = torch.randint(0, 270, (4, 65), generator=torch.Generator().manual_seed(1))
    receipts = [
        quantize(open_source(mixtral), tmp_path / f"q{rows}", PACKED, Sample(ids, "words", rows)) for rows in (0, 3)
    ]
    assert receipts[0]["calibration"] is None
    assert set(receipts[1]["calibration"]["tokens_per_expert"]) == {"0", "1"}
    assert [r["routing_agreement"]["tokens"] for r in receipts] == [4 * 64, 64]  # measured on other rows
    assert receipts[1]["calibration"]["tokens"] == 3 * 64
    errors = [r["packed_tensors"]["lm_head.record"]["relative_error"]["lm_head.weight"] for r in receipts]
    assert errors[0] < errors[1], "weighed by importance, the plain error is no longer the least"
