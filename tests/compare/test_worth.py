"""What each expert is worth: held against whole passes, planted experts, and a weight of zero."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from manyhands.compare.worth import Worth, expert_worth, measurable, num_passes
from manyhands.config import ModelConfig
from manyhands.errors import ConfigError, DataError
from manyhands.models import Decoder, init_weights
from manyhands.moe.edit import Edits, Replay

FIELDS = {
    "vocab_size": 24, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "max_position_embeddings": 32,
    "attention": {"num_attention_heads": 2, "head_dim": 8}, "initializer_range": 0.3,
}  # fmt: skip


def make(K: int = 2, E: int = 6, **router: object) -> Decoder:
    fields = {"num_experts": E, "num_experts_per_tok": K, **router}
    moe = {"router": fields, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_shared_experts": 1}
    model = Decoder(ModelConfig(**FIELDS, moe=moe))
    init_weights(model, 0)
    return model.eval()


def texts(model: Decoder, B: int = 12, S: int = 16) -> Tensor:
    """The model's own greedy words after random ones: it predicts them well, as it is."""
    ids = torch.randint(24, (B, 2), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        while ids.shape[1] < S:
            ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), 1)
    return ids


def loss_B(model: Decoder, ids: Tensor, edit: Edits | None = None) -> Tensor:
    """[B] nats per token."""
    with torch.no_grad():
        logits = model(ids[:, :-1], edit=edit).logits.double()
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


def test_an_experts_tokens_keep_their_others_and_all_the_weight() -> None:
    """Where the router's weights add up to one, that is what it would have given to the others by itself."""
    model = make(norm_topk_prob=True, routed_scaling_factor=1.5)
    ids = texts(model)
    found, base_B = expert_worth(model, ids), loss_B(model, ids)
    with torch.no_grad():
        routings = model(ids[:, :-1]).routings
    assert list(found.layers) == [1, 2] and (found.texts, found.tokens) == (12, 180)
    assert found.loss == pytest.approx(float(base_B.mean()), abs=1e-5)
    for layer, of_layer in found.layers.items():
        ids_TK = routings[layer].expert_ids
        for e in of_layer.experts:
            left = Replay(ids_TK.where(ids_TK != e.expert, -1))
            rise_B = loss_B(model, ids, {layer: left}) - base_B
            assert e.cost == pytest.approx(float(rise_B.mean()), abs=1e-5)
            assert e.error == pytest.approx(float(rise_B.std()) / 12**0.5, abs=1e-5)
            assert e.tokens == int((ids_TK == e.expert).sum()) and e.share == pytest.approx(e.tokens / ids_TK.numel())
        assert max(e.cost for e in of_layer.experts) > 0.02


def test_passes_that_begin_at_their_layer_are_whole_passes() -> None:
    """Of every kind of model that a layer can be told in, in float64 up to rounding."""
    for model in (make(), make(1), make(3, score="sigmoid", bias=True, n_group=2, topk_group=2), multiplied()):
        ids = texts(model, 4, 10)
        model.double()
        fast, whole = expert_worth(model, ids), expert_worth(model, ids, plain=True)
        assert numbers(fast) == pytest.approx(numbers(whole), abs=1e-9)
        assert len(numbers(fast)) == num_passes({n: m.router.config for n, m in model.sparse_layers().items()})


def multiplied() -> Decoder:
    """Granite's and Gemma's additions: what a block adds is scaled, or normalised; so are the states."""
    moe = {"router": {"num_experts": 4, "num_experts_per_tok": 2}, "moe_intermediate_size": 16}
    config = ModelConfig(
        **FIELDS, moe=moe, residual_multiplier=0.5, output_multiplier=0.7, embedding_multiplier=2.0, output_norms=True
    )
    model = Decoder(config)
    init_weights(model, 0)
    return model.eval()


def numbers(found: Worth) -> list[float]:
    each = [
        [e.cost for e in layer.experts] + [layer.null, layer.shuffled, layer.random] for layer in found.layers.values()
    ]
    return [found.loss, *(number for layer in each for number in layer)]


def test_with_one_expert_per_token_it_is_a_weight_of_zero() -> None:
    """What `lab run collapse` has measured ever since: nothing comes in the place of a token's only expert."""
    model = make(1, 8)
    with torch.no_grad():  # nobody chooses expert 5 of layer 1
        model.sparse_layers()[1].router.weight[5] = 0.0
    ids = texts(model)
    found, whole = expert_worth(model, ids), float(loss_B(model, ids).mean())
    for layer, of_layer in found.layers.items():
        assert [e.expert for e in of_layer.experts] == list(range(8))
        assert sum(e.share for e in of_layer.experts) == pytest.approx(1.0, abs=1e-6)
        down_EDF = model.sparse_layers()[layer].experts.down_proj
        for one in of_layer.experts:
            kept = down_EDF[one.expert].detach().clone()
            with torch.no_grad():
                down_EDF[one.expert] = 0.0
                expected = float(loss_B(model, ids).mean()) - whole
                down_EDF[one.expert] = kept
            assert one.cost == pytest.approx(expected, abs=1e-6)
            assert one.share > 0.0 or (one.cost, one.error, one.tokens) == (0.0, 0.0, 0)
    assert any(e.share == 0.0 for e in found.layers[1].experts)


def test_planted_experts_are_found_though_the_router_is_balanced() -> None:
    """Layer 1: expert 2 says nothing, expert 4 is expert 0. Layer 2: all experts are one. No load shows any of it."""
    model = make(2, 6)
    first, second = (model.sparse_layers()[layer].experts for layer in (1, 2))
    with torch.no_grad():
        first.down_proj[2] = 0.0
        for weights in (first.gate_up_proj, first.down_proj):
            weights[4] = weights[0]
        for weights in (second.gate_up_proj, second.down_proj):
            weights[:] = weights[0].clone()
    found = expert_worth(model, texts(model, 24))
    one, two = found.layers[1], found.layers[2]
    assert all(0.02 < e.share < 0.5 for layer in (one, two) for e in layer.experts)

    assert [e.expert for e in one.experts if e.size == 0.0] == [2]
    assert [e.expert for e in one.experts if e.distance < 1e-6] == [0, 4]  # type: ignore[operator]
    assert one.experts[0].twin == 4 and one.experts[4].twin == 0
    assert all(e.distance > 0.3 for e in one.experts if e.expert not in (0, 4))  # type: ignore[operator]
    assert one.shuffled > 0.05 and one.random > 0.05

    assert all(abs(e.cost) < 1e-5 and e.distance < 1e-6 for e in two.experts)  # type: ignore[operator]
    assert max(map(abs, (two.null, two.shuffled, two.random))) < 1e-5


def test_the_null_is_an_even_share_of_pairs() -> None:
    """Taken at random it costs what an expert of an even share costs on average, if all experts are alike."""
    model = make(1, 4)
    ids = texts(model, 48)
    layer = expert_worth(model, ids).layers[1]
    per_share = sum(e.cost for e in layer.experts) / 4
    assert layer.null == pytest.approx(per_share, rel=0.5) and layer.null > 0
    assert expert_worth(model, ids, seed=1).layers[1].null != layer.null
    assert expert_worth(model, ids).layers[1] == layer


def test_nothing_about_the_model_or_the_generators_changes() -> None:
    model = make().train()
    ids = texts(model)
    before, state = torch.get_rng_state(), {name: t.clone() for name, t in model.state_dict().items()}
    expert_worth(model, ids)
    assert torch.equal(torch.get_rng_state(), before) and all(module.training for module in model.modules())
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_cannot_be_measured_is_one_clear_error() -> None:
    with pytest.raises(DataError, match=re.escape("texts are [1, 9]: an error needs two texts")):
        expert_worth(make(), torch.zeros(1, 9, dtype=torch.int64))
    model = make(select="expert_choice")
    assert not measurable({n: m.router.config for n, m in model.sparse_layers().items()}) and not measurable({})
    with pytest.raises(ConfigError, match="layer 1: select = 'expert_choice'"):
        expert_worth(model, torch.zeros(2, 9, dtype=torch.int64))
