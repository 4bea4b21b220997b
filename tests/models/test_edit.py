"""A model that is told who goes where."""

import re

import pytest
import torch

from manyhands.config import ModelConfig, MoEConfig, RouterConfig
from manyhands.errors import ConfigError
from manyhands.models import Decoder, init_weights
from manyhands.moe import Mask, Replay, Swap

CONFIG = ModelConfig(
    vocab_size=61,
    hidden_size=32,
    num_hidden_layers=3,
    intermediate_size=48,
    max_position_embeddings=64,
    attention={"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    moe=MoEConfig(
        router=RouterConfig(num_experts=6, num_experts_per_tok=2),
        moe_intermediate_size=24,
        first_k_dense_replace=1,
        n_shared_experts=1,
    ),
)


def make(seed: int = 0, config: ModelConfig = CONFIG) -> Decoder:
    model = Decoder(config)
    init_weights(model, seed)
    with torch.no_grad():
        for layer in model.sparse_layers().values():
            layer.router.weight.normal_(generator=torch.Generator().manual_seed(seed))
    return model.eval()


def some_ids(B: int = 3, S: int = 12) -> torch.Tensor:
    return torch.randint(61, (B, S), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("weights", [False, True])
def test_a_replayed_forward_has_the_recorded_logits_bit_for_bit(weights: bool) -> None:
    model, ids = make(), some_ids()
    out = model(ids)
    again = model(ids, edit={layer: Replay.of(routing, weights) for layer, routing in out.routings.items()})
    assert torch.equal(again.logits, out.logits) and torch.equal(model(ids, edit=out.routings).logits, out.logits)


def test_a_replay_survives_padding_recomputation_and_a_cache() -> None:
    model, ids = make(), some_ids()
    mask = torch.ones_like(ids).bool()
    mask[1, :5] = False
    out = model.hidden(ids, mask)
    again = model.hidden(ids, mask, recompute=True, edit=out.routings)
    assert torch.equal(again.states, out.states)
    cache, states = model.new_cache(), []
    for first, last in ((0, 7), (7, 8), (8, 12)):  # of one text, in pieces
        tokens = slice(12 + first, 12 + last)
        edit = {layer: Replay(routing.expert_ids[tokens]) for layer, routing in model.hidden(ids).routings.items()}
        part = model.hidden(ids[1:2, first:last], cache=cache, edit=edit)
        assert all(torch.equal(r.expert_ids, edit[n].expert_ids) for n, r in part.routings.items())
        states.append(part.states)
    torch.testing.assert_close(torch.cat(states, 1), model.hidden(ids[1:2]).states)


def test_rollout_and_trainer_agree() -> None:
    """Weights have moved since the rollout: the same experts compute, and the trainer's routers have gradient."""
    rollout, trainer, ids = make(0), make(0).train(), some_ids()
    with torch.no_grad():
        recorded = rollout(ids).routings
        for p in trainer.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(2)), alpha=0.05)
    free = trainer(ids).routings
    out = trainer(ids, edit=recorded)
    assert any(not torch.equal(free[n].expert_ids, recorded[n].expert_ids) for n in recorded)
    assert all(torch.equal(out.routings[n].expert_ids, recorded[n].expert_ids) for n in recorded)
    out.logits.square().mean().backward()
    assert all(mlp.router.weight.grad.abs().sum() > 0 for mlp in trainer.sparse_layers().values())


def test_a_mask_is_a_model_whose_router_never_had_the_expert() -> None:
    model, ids, off = make(), some_ids(), 4
    moe = CONFIG.moe.model_copy(update={"router": RouterConfig(num_experts=5, num_experts_per_tok=2)})
    never = make(config=CONFIG.model_copy(update={"moe": moe}))
    keep = torch.tensor([e for e in range(6) if e != off])
    state = {n: t[keep] if ".experts." in n or ".router." in n else t for n, t in model.state_dict().items()}
    never.load_state_dict(state)
    out, expected = model(ids, edit={1: Mask((off,)), 2: Mask((off,))}), never(ids)
    torch.testing.assert_close(out.logits, expected.logits)
    assert all(torch.equal(r.expert_ids, keep[expected.routings[n].expert_ids]) for n, r in out.routings.items())
    assert not torch.equal(out.logits, model(ids).logits)


def test_only_the_named_layer_is_edited() -> None:
    model, ids = make(), some_ids()
    plain, out = model(ids).routings, model(ids, edit={2: Swap(0, 1)}).routings
    assert torch.equal(out[1].expert_ids, plain[1].expert_ids)
    assert not torch.equal(out[2].expert_ids, plain[2].expert_ids)


@pytest.mark.parametrize(
    "edit, says",
    [
        ({0: Mask((1,))}, "there is no router in layer 0: these have one: [1, 2]"),
        ({2: Mask((6,))}, "layer 2: there is no expert 6"),
        ({1: Mask((0, 1, 2, 3, 4))}, "layer 1: without 5 experts 1 of 6 are left, and a token needs 2"),
        ({1: Replay(torch.zeros(5, 2).long())}, "expert_ids are [5, 2], the tokens and their experts [36, 2]"),
    ],
)  # fmt: skip
def test_a_wrong_edit_is_refused_before_the_cache_grows(edit: dict, says: str) -> None:
    model, cache = make(), None
    if "expert_ids" not in says:
        cache = model.new_cache()
    with pytest.raises(ConfigError, match=re.escape(says)):
        model.hidden(some_ids() if cache is None else some_ids(1), cache=cache, edit=edit)
    assert cache is None or not cache.length
