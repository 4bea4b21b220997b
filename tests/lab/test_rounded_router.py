"""The bfloat16 router rounds, is the float32 one otherwise, and no configuration asks for it."""

import pytest
import torch

from manyhands.config import ModelConfig, MoEConfig, RouterConfig
from manyhands.config.run import OptimConfig
from manyhands.engine.runner import Runner
from manyhands.errors import ConfigError
from manyhands.lab.rounded_router import RoundedRouter, round_routers
from manyhands.models import Decoder, init_weights
from manyhands.moe import Router
from manyhands.moe.edit import Mask
from manyhands.train.optim import build_optimizers


def _router(**settings: object) -> Router:
    torch.manual_seed(0)
    return Router(RouterConfig.model_validate({"num_experts": 8, "num_experts_per_tok": 2, **settings}), 16)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_it_is_the_float32_router_of_rounded_numbers(score: str) -> None:
    exact = _router(score=score)
    rounded = RoundedRouter(exact)
    x_TD = torch.randn(64, 16)
    found, wanted = rounded(x_TD), exact(x_TD)
    for part in (found.logits, found.scores, found.weights):
        assert part.dtype == torch.float32
        assert torch.equal(part, part.bfloat16().float())
    spacing = 2.0**-8  # half a unit of bfloat16, relative
    largest = (x_TD.abs() @ exact.weight.detach().abs().t()).max()
    assert float((found.logits - wanted.logits).detach().abs().max()) < 4 * spacing * float(largest)
    assert not torch.equal(found.logits, wanted.logits)
    assert torch.equal(found.kept, wanted.kept) and torch.equal(found.token_mask, wanted.token_mask)
    found.weights[:, 0].sum().backward()
    gradient = exact.weight.grad
    assert gradient is not None and gradient.dtype == torch.float32 and bool(gradient.any())


def test_a_model_trains_and_is_read_with_it_and_keeps_its_parameters() -> None:
    config = ModelConfig(
        vocab_size=16,
        hidden_size=16,
        num_hidden_layers=2,
        moe=MoEConfig(moe_intermediate_size=8, router=RouterConfig(num_experts=4, num_experts_per_tok=1)),
    )
    model = Decoder(config)
    init_weights(model, 0)
    optimizers, names = build_optimizers(model, OptimConfig()), [name for name, _ in model.named_parameters()]
    ids = torch.randint(0, 16, (2, 8))
    before = model(ids).routings[0].logits
    round_routers(model)
    round_routers(model)
    assert [name for name, _ in model.named_parameters()] == names
    trained = {id(p) for group in optimizers.groups for p in group["params"]}
    assert {id(p) for p in model.parameters()} == trained
    model.eval()
    for logits in (model(ids).routings[0].logits, Runner(model).score(ids, None).routings[0].logits):
        assert torch.equal(logits, logits.bfloat16().float())
        assert not torch.equal(logits, before)
    with pytest.raises(ConfigError, match="no edit"):
        model(ids, edit={0: Mask((1,))})


@pytest.mark.parametrize("settings", [{"jitter": 0.1}, {"noisy": True}, {"bias": True}, {"capacity_factor": 1.0}])
def test_what_it_does_not_compute_it_refuses(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        RoundedRouter(_router(**settings))
