"""What each expert is worth."""

import pytest
import torch
import torch.nn.functional as F

from manyhands.config import ModelConfig
from manyhands.lab.silence import silence
from manyhands.models import Decoder, init_weights

FIELDS = {
    "vocab_size": 24, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "max_position_embeddings": 32,
    "attention": {"num_attention_heads": 2, "head_dim": 8}, "initializer_range": 0.3,
    "moe": {"router": {"num_experts": 8, "num_experts_per_tok": 1}, "moe_intermediate_size": 16},
}  # fmt: skip


def test_silence_is_a_weight_of_zero() -> None:
    model = Decoder(ModelConfig(**FIELDS)).eval()
    init_weights(model, 0)
    with torch.no_grad():  # nobody chooses expert 5 of layer 1
        model.sparse_layers()[1].router.weight[5] = 0.0
    ids = torch.randint(24, (3, 11), generator=torch.Generator().manual_seed(1))
    found = silence(model, ids)
    assert [(e.layer, e.expert) for e in found] == [(layer, e) for layer in (0, 1) for e in range(8)]
    assert sum(e.share for e in found) == pytest.approx(2.0, abs=1e-6)
    whole = loss(model, ids)
    for one in found:
        down_EDF = model.sparse_layers()[one.layer].experts.down_proj
        kept = down_EDF[one.expert].detach().clone()
        with torch.no_grad():
            down_EDF[one.expert] = 0.0
            expected = loss(model, ids) - whole
            down_EDF[one.expert] = kept
        assert abs(one.increase - expected) < 1e-6
        if one.share == 0.0:
            assert one.increase == 0.0
    assert any(e.share == 0.0 for e in found) and max(e.increase for e in found) > 0.01


def loss(model: Decoder, ids: torch.Tensor) -> float:
    with torch.no_grad():
        logits = model(ids[:, :-1]).logits.flatten(0, 1)
    return float(F.cross_entropy(logits.double(), ids[:, 1:].flatten()))
