"""torch.compile: one graph in inference and in training, the same numbers."""

import pytest
import torch

from manyhands.config import ModelConfig
from manyhands.kernels import choose, native
from manyhands.models import Decoder, init_weights

IDS = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> Decoder:
    attention = {"num_attention_heads": 2, "head_dim": 16, "qk_norm": "head"}
    moe = {"router": {"num_experts": 4, "num_experts_per_tok": 2}, "moe_intermediate_size": 16}
    model = Decoder(ModelConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, attention=attention, moe=moe))
    init_weights(model, seed=0)
    return model.eval()


@pytest.mark.skipif(not native.available(), reason="the other backends break the graph")
@pytest.mark.filterwarnings("ignore")
def test_the_whole_model_is_one_graph(model: Decoder) -> None:
    compiled = torch.compile(lambda ids: model(ids).logits, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(IDS), model(IDS).logits)
    grads = []
    for run in (lambda ids: model(ids).logits, compiled):
        model.zero_grad()
        run(IDS).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*grads)


def test_what_auto_takes_can_be_traced(model: Decoder, monkeypatch) -> None:
    monkeypatch.setattr("manyhands.kernels.policy.level_here", lambda: None)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    experts = model.layers[0].mlp.experts.weights()
    assert choose(torch.zeros(1, 32), experts) == "eager"  # PyTorch traces its grouped product in bfloat16 only
    assert choose(torch.zeros(1, 32, dtype=torch.bfloat16), experts) == "grouped_mm"
