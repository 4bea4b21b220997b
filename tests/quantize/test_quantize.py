"""Quantising: what is refused, and what a sample changes."""

import math

import pytest
import torch
import torch.nn.functional as F

from manyhands.checkpoint.model import load_model, save
from manyhands.checkpoint.source import open_source
from manyhands.config import ModelConfig, PackedConfig, Packing
from manyhands.errors import CheckpointError, UserError
from manyhands.models import Decoder, init_weights
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


@pytest.mark.parametrize("linear", [Packing(format="int8"), None])
def test_layer_norm_and_a_bias_on_the_head(linear, tmp_path):
    config = ModelConfig(
        vocab_size=80, hidden_size=64, num_hidden_layers=1, norm="layer_norm", lm_head_bias=True, initializer_range=0.2,
        moe={"router": {"select": "sparsemixer", "norm_topk_prob": False}, "moe_intermediate_size": 32},
    )  # fmt: skip
    model = Decoder(config).eval()
    init_weights(model, seed=0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(torch.linspace(-1.0, 1.0, len(p)) if name.endswith("bias") else 0.0)
    save(model, tmp_path / "whole")
    packed = PackedConfig(experts=PACKED.experts, linear=linear)
    receipt = quantize(open_source(tmp_path / "whole"), tmp_path / "packed", packed, Sample(IDS % 80, "words"))
    with torch.no_grad():
        before, after = model(IDS % 80).logits, load_model(tmp_path / "packed", dtype=torch.float32)(IDS % 80).logits
    assert float((after - before).norm() / before.norm()) < 0.2
    nats = [float(F.cross_entropy(y[:, :-1].flatten(0, 1), (IDS % 80)[:, 1:].flatten())) for y in (before, after)]
    assert list(receipt["perplexity"].values())[:2] == pytest.approx([math.exp(n) for n in nats], rel=2e-2)
