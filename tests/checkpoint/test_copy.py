"""A copy of a loaded model, as averages and references are made, shares no weight with it."""

import copy

import pytest
import torch

from manyhands.checkpoint.model import load_model, save
from manyhands.checkpoint.source import open_source
from manyhands.config import PackedConfig
from manyhands.models import Decoder, init_weights
from manyhands.quantize.quantize import quantize

from ..small_runs import small_run


@pytest.mark.parametrize("packed", [False, True])
def test_a_deep_copy_is_equal_and_independent(tmp_path, packed):
    decoder = Decoder(small_run(tmp_path).model, "auto")
    init_weights(decoder, 0)
    save(decoder, tmp_path / "m")
    if packed:
        formats = {"experts": {"format": "bf16", "group_size": 0}, "linear": {"format": "bf16", "group_size": 0}}
        quantize(open_source(tmp_path / "m"), tmp_path / "packed", PackedConfig.model_validate(formats))
    model, ids = load_model(tmp_path / ("packed" if packed else "m")), torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        before = model(ids).logits
        other = copy.deepcopy(model)
        assert torch.equal(other(ids).logits, before)
        other.norm.weight.mul_(2.0)
        other.embed_tokens.weight.mul_(2.0)
        assert torch.equal(model(ids).logits, before) and not torch.equal(other(ids).logits, before)
