"""The recurrent model: step by step as at once, padding on any side, against its equations in float64, dropout."""

import pytest
import torch
from torch import Tensor

from manyhands.config import RecurrentConfig
from manyhands.config.shapes import tensor_shapes
from manyhands.errors import ConfigError
from manyhands.models import Recurrent, init_weights
from manyhands.moe.edit import Force

HIERARCHY = {"num_experts": 8, "num_experts_per_tok": 2, "select": "hierarchical", "n_group": 4, "topk_group": 2}
CONFIG = RecurrentConfig(
    vocab_size=50,
    hidden_size=16,
    num_hidden_layers=3,
    moe_after=(0, 1),
    moe={"router": {**HIERARCHY, "noisy": True}, "moe_intermediate_size": 8, "hidden_act": "relu"},
)


def model(config: RecurrentConfig = CONFIG) -> Recurrent:
    made = Recurrent(config).eval()
    init_weights(made, 0)
    return made


def ids(*shape: int) -> Tensor:
    return torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "lstm_bias": False}, {"moe": None}])
def test_its_tensors_are_those_that_are_described(changes: dict[str, object]) -> None:
    config = RecurrentConfig(**{**CONFIG.model_dump(), **changes})
    assert {name: tuple(t.shape) for name, t in Recurrent(config).state_dict().items()} == tensor_shapes(config)


def by_hand(made: Recurrent, ids_S: Tensor) -> Tensor:
    """Logits of one sequence from the equations, token by token, every expert written out."""
    p = {name: t.double() for name, t in made.state_dict().items()}
    D, L = 16, 3
    h, c, rows = [torch.zeros(D).double()] * L, [torch.zeros(D).double()] * L, []
    for token in ids_S.tolist():
        x = p["embed_tokens.weight"][token]
        for n in range(L):
            w = f"layers.{n}.lstm."
            i, f, g, o = (p[w + "weight_ih"] @ x + p[w + "weight_hh"] @ h[n] + p[w + "bias"]).chunk(4)
            c[n] = f.sigmoid() * c[n] + i.sigmoid() * g.tanh()
            h[n] = o.sigmoid() * c[n].tanh()
            x = x + h[n]
            if n in made.sparse_layers():
                w = f"layers.{n}.mlp."
                first, second = p[w + "router.group_weight"] @ x, p[w + "router.weight"] @ x
                groups = first.topk(2).indices
                y = torch.zeros(D).double()
                for gate, group in zip(first[groups].softmax(0), groups.tolist(), strict=True):
                    e = 2 * group + int(second[2 * group : 2 * group + 2].argmax())  # one of each group: its gate is 1
                    hidden = (p[w + "experts.up_proj"][e] @ x).clamp(min=0)
                    y = y + gate * (p[w + "experts.down_proj"][e] @ hidden)
                x = x + y.sigmoid()
        rows.append(p["lm_head.weight"] @ x)
    return torch.stack(rows)


def test_it_is_what_the_paper_writes() -> None:
    made, text = model(), ids(1, 9)
    assert torch.allclose(made(text).logits[0].double(), by_hand(made, text[0]), atol=1e-5)


def test_step_by_step_is_the_whole_sequence() -> None:
    made, text = model(), ids(2, 7)
    whole, cache = made(text), made.new_cache()
    parts = [made(part, cache=cache) for part in text.split([3, 1, 1, 2], 1)]
    assert torch.allclose(torch.cat([part.logits for part in parts], 1), whole.logits, atol=1e-6)
    assert cache.length == 7
    with pytest.raises(ConfigError, match="another batch than these 3 sequences"):
        made(ids(3, 1), cache=cache)


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_changes_nothing(side: str) -> None:
    made, text = model(), ids(3, 6)
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[0, : 2 if side != "right" else 0] = False
    mask[1, 4 if side != "left" else 6 :] = False
    mask[2] = side != "both"  # a row of padding alone keeps its state
    cache = made.new_cache()
    out = made(text, mask, cache)
    follow = made(ids(3, 2), cache=cache).logits
    for row in range(3):
        alone, own = text[row][mask[row]][None], made.new_cache()
        if alone.numel():
            found = made(alone, cache=own).logits[0]
            assert torch.allclose(out.logits[row][mask[row]], found, atol=1e-5)
        assert torch.allclose(follow[row], made(ids(3, 2)[row][None], cache=own).logits[0], atol=1e-5)
    assert torch.equal(out.routings[0].token_mask, mask.flatten())


def test_gradients_are_the_same_with_padding_and_recomputed() -> None:
    made, text = model(), ids(2, 5)
    mask = torch.tensor([[True] * 5, [False] * 2 + [True] * 3])

    def gradients(**how: object) -> list[Tensor]:
        made.zero_grad()
        made.hidden(text, mask, **how).states[mask].pow(2).sum().backward()  # type: ignore[arg-type]
        return [p.grad.clone() for p in made.parameters() if p.grad is not None]

    plain = gradients()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, gradients(recompute=True), strict=True))
    made.zero_grad()
    for row in range(2):
        made.hidden(text[row][mask[row]][None]).states.pow(2).sum().backward()
    apart = [p.grad for p in made.parameters() if p.grad is not None]
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(plain, apart, strict=True))


def test_dropout_is_for_training_and_bfloat16_computes_on_float32() -> None:
    made, text = model(RecurrentConfig(**{**CONFIG.model_dump(), "dropout": 0.5})), ids(2, 5)
    assert torch.equal(made(text).logits, made(text).logits)
    made.train()
    assert not torch.equal(made(text).logits, made(text).logits)
    out = made.eval()(text, dtype=torch.bfloat16)
    assert out.logits.dtype == torch.bfloat16 and made.embed_tokens.weight.dtype == torch.float32


def test_an_edit_is_followed_where_a_router_can() -> None:
    flat = {"num_experts": 4, "num_experts_per_tok": 1}
    made = model(RecurrentConfig(**{**CONFIG.model_dump(), "moe": {"router": flat, "moe_intermediate_size": 8}}))
    assert (made(ids(1, 4), edit={0: Force((2,))}).routings[0].expert_ids == 2).all()
    with pytest.raises(ConfigError, match="there is no router in layer 2"):
        made(ids(1, 4), edit={2: Force((0,))})
