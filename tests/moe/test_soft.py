"""Soft MoE (§9): slots of all tokens, tokens of all slots."""

import pytest
import torch

from manyhands.config import ModelConfig, MoEConfig, RecurrentConfig, RouterConfig, parse
from manyhands.errors import ConfigError
from manyhands.moe import Mask

from .make_routing import make_layer, tokens

SOFT = {"select": "soft", "num_experts": 3, "slots_per_expert": 2}


def test_without_directions_every_slot_is_the_mean_token() -> None:
    layer = make_layer(router=SOFT)
    with torch.no_grad():
        layer.router.weight.zero_()
    x = tokens(2, 5, 8)
    y, routing = layer(x)
    mean = x.mean(1)
    gate, up = torch.einsum("bd,efd->bef", mean, layer.experts.gate_up_proj).chunk(2, -1)
    said = torch.einsum("bef,edf->bed", torch.nn.functional.silu(gate) * up, layer.experts.down_proj).mean(1)
    torch.testing.assert_close(y, said[:, None].expand_as(y), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(routing.weights, torch.full((10, 3), 1 / 3))


def test_the_routing_adds_up_to_the_output() -> None:
    layer, x = make_layer(router={**SOFT, "routed_scaling_factor": 1.5}), tokens(2, 5, 8)
    y, routing = layer(x, keep_outputs=True)
    added = torch.einsum("te,ted->td", routing.weights, routing.expert_outputs)
    torch.testing.assert_close(added.view_as(y), y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(routing.logits.softmax(1), routing.scores)


def test_sequences_do_not_see_each_other_and_padding_is_in_no_slot() -> None:
    layer, x = make_layer(router=SOFT), tokens(2, 6, 8)
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    y = layer(x, mask)[0]
    torch.testing.assert_close(layer(x[1:, :4])[0][0], y[1, :4], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer(x[:1])[0][0], y[0], rtol=1e-5, atol=1e-5)
    assert layer(x, torch.zeros_like(mask))[0].isfinite().all()


def test_later_tokens_are_seen() -> None:
    layer, x = make_layer(router=SOFT), tokens(1, 6, 8)
    other = torch.cat((x[:, :5], tokens(1, 1, 8, seed=9)), 1)
    assert not torch.allclose(layer(x)[0][:, :5], layer(other)[0][:, :5])
    assert not layer.router.config.causal_safe


def test_every_expert_and_every_token_gets_a_gradient() -> None:
    layer, x = make_layer(router=SOFT), tokens(2, 5, 8).requires_grad_()
    layer(x)[0].square().sum().backward()
    for parameter in (x, *layer.parameters()):
        assert (parameter.grad.flatten(1) if parameter.dim() > 1 else parameter.grad[None]).abs().sum(1).min() > 0


def test_what_is_refused() -> None:
    for kind in (ModelConfig, RecurrentConfig):
        with pytest.raises(ConfigError, match="mixes all tokens of a sequence, later ones too"):
            parse(kind, {"moe": {"router": {"select": "soft"}}})
    with pytest.raises(ConfigError, match="only a router that picks the top k"):
        make_layer(router=SOFT)(tokens(1, 4, 8), edit=Mask((0,)))
    with pytest.raises(ConfigError, match="call the layer"):
        make_layer(router=SOFT).router(tokens(4, 8))
    with pytest.raises(ConfigError, match="goes with 'soft'"):
        RouterConfig(slots_per_expert=2)
    with pytest.raises(ConfigError, match="capacity"):
        RouterConfig(select="soft", capacity_factor=1.0)
    assert MoEConfig(router=RouterConfig(**SOFT)).router.most_experts_per_tok == 3
