"""What is observed of a model is what it does; random routers are busy as it is, and know nothing."""

import numpy as np
import pytest
import torch

import manyhands as mh
from manyhands.errors import UserError
from manyhands.inspect.texts import Sequences
from manyhands.inspect.watch import observe
from manyhands.trace.random_router import RandomRouter


def small(**router) -> mh.Decoder:
    moe = mh.MoEConfig(
        moe_intermediate_size=16, first_k_dense_replace=1, router={"num_experts": 8, "num_experts_per_tok": 2, **router}
    )
    config = mh.ModelConfig(vocab_size=50, hidden_size=32, num_hidden_layers=3, max_position_embeddings=64, moe=moe)
    model = mh.Decoder(config)
    mh.init_weights(model, seed=0)
    return model


def sequences(sizes=(5, 12, 12, 7)) -> Sequences:
    number = np.repeat(np.arange(len(sizes)), sizes)
    ids = np.random.default_rng(0).integers(0, 50, sum(sizes))
    return Sequences(ids, number, number, np.zeros_like(ids), ("text",), None, None)


def test_routing_is_the_models_own_and_padding_and_front_leave_no_trace() -> None:
    model, read = small(), sequences()
    seen = observe(model, read, front_ids=(3,), random_routers=2)
    assert seen.layers == (1, 2) and seen.random_ids.shape == (2, 36, 2, 2)
    for number in range(4):
        rows = read.sequence == number
        ids = torch.tensor([[3, *read.token_ids[rows].tolist()]])
        with torch.inference_mode():
            routings = model(ids).routings
        for i, layer in enumerate(seen.layers):
            assert (seen.expert_ids[rows, i] == routings[layer].expert_ids[1:].numpy()).all()
    assert (seen.expert_ids >= 0).all() and (seen.early_ids >= 0).all() and (seen.random_ids >= 0).all()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_early_is_the_router_on_the_residual_before_attention() -> None:
    model, read = small(), sequences((9,))
    seen = observe(model, read, random_routers=0)
    with torch.no_grad():
        for block in model.layers:
            torch.nn.init.zeros_(block.self_attn.o_proj.weight)
    blind = observe(model, read, random_routers=0)
    assert (blind.early_ids == blind.expert_ids).all(), "attention adds nothing: early is exact"
    assert (seen.early_ids != seen.expert_ids).any()
    assert seen.random_ids is None


@pytest.mark.parametrize("E", [8, 64])
def test_random_routers_are_as_long_and_as_busy(E: int) -> None:
    torch.manual_seed(0)
    router = mh.Router(mh.RouterConfig(num_experts=E, num_experts_per_tok=4), 32)
    states = torch.randn(4000, 32) + torch.randn(32)  # a common direction, which makes loads uneven
    ids = router(states).expert_ids
    random = RandomRouter(router, states, ids, seed=1)
    assert torch.allclose(random.weight_ED.norm(dim=1), router.weight.norm(dim=1))
    wanted, found = (torch.bincount(x.flatten(), minlength=E) / x.numel() for x in (ids, random(states)))
    assert float((wanted - found).abs().sum() / 2) < 0.02
    assert float((random(states).sort(1)[0] == ids.sort(1)[0]).all(1).float().mean()) < 0.5, "it is another router"


def test_routers_without_scores_have_no_random_ones() -> None:
    seen = observe(small(select="hash", num_experts_per_tok=1), sequences())
    assert seen.random_ids is None and seen.early_ids is None and (seen.expert_ids >= 0).all()


def test_a_dense_model_is_told_so() -> None:
    model = mh.Decoder(mh.ModelConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1))
    with pytest.raises(UserError, match="no mixture-of-experts layer"):
        observe(model, sequences())
