"""Calibration reaches every matrix of an expert: the records are those that the inputs' mean squares ask for."""

import pytest
import torch
import torch.nn.functional as F

from manyhands.checkpoint.model import load_model, save
from manyhands.checkpoint.source import open_source
from manyhands.config import ModelConfig, MoEConfig, PackedConfig, Packing, RouterConfig
from manyhands.kernels import ExpertWeights
from manyhands.models import Decoder, init_weights
from manyhands.moe import Experts, MoELayer
from manyhands.quant import pack_experts
from manyhands.quantize.calibrate import watching
from manyhands.quantize.figures import agreement
from manyhands.quantize.quantize import quantize
from manyhands.quantize.receipt import Sample

D, WIDTH, E, ROWS, S = 32, 32, 2, 6, 24


@pytest.fixture
def calibrated(tmp_path):
    config = ModelConfig(
        vocab_size=64,
        hidden_size=D,
        num_hidden_layers=1,
        moe=MoEConfig(moe_intermediate_size=WIDTH, router=RouterConfig(num_experts=E, num_experts_per_tok=E)),
    )
    model = Decoder(config)
    init_weights(model, seed=0)
    experts = model.layers[0].mlp.experts
    with torch.no_grad():  # hidden values of very different size, which is what calibration is about
        experts.gate_up_proj[:, WIDTH:] *= torch.logspace(0, 2, WIDTH)[:, None]
    save(model, tmp_path / "M")
    ids = torch.randint(64, (ROWS, S + 1), generator=torch.Generator().manual_seed(1))
    packed = PackedConfig(experts=Packing(format="int4", group_size=32))
    quantize(open_source(tmp_path / "M"), tmp_path / "P", packed, Sample(ids, None, calibration_rows=ROWS - 1))
    return model.eval(), ids[: ROWS - 1, :-1], load_model(tmp_path / "P").layers[0].mlp.experts


def test_both_matrices_are_rounded_by_what_they_are_given(calibrated):
    model, ids, found = calibrated
    given = []
    experts = model.layers[0].mlp.experts
    experts.register_forward_pre_hook(lambda _, arguments: given.append(arguments[0]))
    with torch.no_grad():
        model(ids)
        (x,) = given
        w: ExpertWeights = experts.weights()
        hidden = [F.silu(x @ w.up[e, :WIDTH].T) * (x @ w.up[e, WIDTH:].T) for e in range(E)]
    up = torch.stack([x.square().mean(0)] * E)
    down = torch.stack([h.square().mean(0) for h in hidden])

    def error(importance) -> torch.Tensor:
        """Σ E[x²]·(W − Ŵ)² of each matrix: what calibration makes small."""
        packed = found.packed if importance is None else pack_experts(w, "int4", 32, importance)
        ups, downs, *_ = packed.dequantize()
        return torch.stack([(up[:, None] * (ups - w.up) ** 2).sum(), (down[:, None] * (downs - w.down) ** 2).sum()])

    even = torch.ones_like(up), torch.ones_like(down)
    right, ignored = error((up, down)), error((up, even[1]))
    assert ignored[1] > 1.05 * right[1]  # it matters here
    torch.testing.assert_close(error(None), right, rtol=1e-2, atol=0.0)


def test_calibration_sees_each_input():
    config = MoEConfig(router=RouterConfig(num_experts=40, num_experts_per_tok=2), moe_intermediate_size=8)
    layer = MoELayer(config, 16).eval()
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_()
        layer.router.weight[7] = 0  # no token's choice, or nearly
    x = torch.randn(200, 16)
    with watching(layer) as seen, torch.no_grad():
        _, routing = layer(x)
    assert isinstance(layer.experts, Experts) and seen.tokens_per_expert == routing.expert_counts().tolist()
    often = seen.tokens_per_expert.index(max(seen.tokens_per_expert))
    chosen = x[(routing.expert_ids == often).any(-1)]
    torch.testing.assert_close(seen.up[often], chosen.square().mean(0))
    rare = seen.too_few[0]
    torch.testing.assert_close(seen.up[rare], x.square().mean(0))
    assert seen.down.shape == (40, 8) and bool((seen.down > 0).all())
    assert agreement(routing, routing) == 1.0
