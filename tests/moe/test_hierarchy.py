"""The two-level gate against its dense definition, gradients too; its losses; what it refuses."""

import pytest
import torch
from torch import Tensor

from manyhands.config import MoEConfig, RouterConfig
from manyhands.errors import ConfigError
from manyhands.moe import MoELayer, Router
from manyhands.moe.balance import cv_squared, importance_loss, load_loss, smooth_load

E, G, D, T = 12, 4, 6, 40
CONFIG = RouterConfig(num_experts=E, num_experts_per_tok=4, select="hierarchical", n_group=G, topk_group=2, noisy=True)


def router(config: RouterConfig = CONFIG) -> Router:
    made = Router(config, D)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in made.parameters():
            weight.normal_()
    return made


def dense(made: Router, x: Tensor) -> Tensor:
    """Appendix B, written as it stands there: [T, E] gates, float64, without noise."""
    rows = []
    for token in x.double():
        first = made.group_weight.double() @ token
        chosen = first.topk(2).indices
        gate = torch.full((G,), -torch.inf, dtype=torch.float64).index_copy(0, chosen, first[chosen]).softmax(0)
        every = []
        for i in range(G):
            second = made.weight.double()[i * 3 : i * 3 + 3] @ token
            best = second.topk(2).indices
            within = torch.full((3,), -torch.inf, dtype=torch.float64).index_copy(0, best, second[best]).softmax(0)
            every.append(gate[i] * within)
        rows.append(torch.cat(every))
    return torch.stack(rows)


def test_it_is_the_dense_definition_and_so_are_its_gradients() -> None:
    made, x = router().eval(), torch.randn(T, D)
    routing = made(x)
    mine = torch.zeros(T, E).scatter_add(1, routing.expert_ids, routing.weights)
    right = dense(made, x)
    assert torch.allclose(mine.double(), right, atol=1e-6)
    probe = torch.randn(T, E)
    (mine * probe).sum().backward()
    found = [made.weight.grad, made.group_weight.grad]
    made.zero_grad()
    (right * probe).sum().backward()
    for a, b in zip(found, [made.weight.grad, made.group_weight.grad], strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert torch.allclose(routing.scores.sum(1), torch.ones(T))
    assert (routing.weights[:, :-1] >= routing.weights[:, 1:]).all() and routing.kept.all()


def test_a_token_stays_in_its_groups() -> None:
    routing = router().train()(torch.randn(T, D))
    groups = routing.expert_ids // 3
    assert routing.groups is not None
    for mine, chosen in zip(groups.tolist(), routing.groups.expert_ids.tolist(), strict=True):
        assert sorted(mine) == sorted(2 * chosen)


def test_load_is_that_of_the_second_level_on_the_tokens_of_its_group() -> None:
    """Load_ij = Load^i_j(X_i)·Load^p_i / |X_i|, term by term; padding is in none of them."""
    made = router().train()
    mask = torch.arange(T) % 5 != 0
    routing = made(torch.randn(T, D), mask)
    assert routing.groups is not None and routing.noisy_logits is not None and routing.noise_std is not None
    first = smooth_load(routing.groups)
    expected = []
    for i in range(G):
        visits = [t for t in range(T) if mask[t] and i in routing.groups.expert_ids[t].tolist()]
        for j in range(3):
            own, load = slice(3 * i, 3 * i + 3), 0.0
            for t in visits:
                noisy, logit = routing.noisy_logits[t, own], routing.logits[t, 3 * i + j]
                others = torch.cat((noisy[:j], noisy[j + 1 :])).sort(descending=True).values
                load += torch.special.ndtr((logit - others[1]) / routing.noise_std[t, 3 * i + j]).item()
            expected.append(load * first[i].item() / max(len(visits), 1))
    assert torch.allclose(smooth_load(routing), torch.tensor(expected), rtol=1e-4, atol=1e-4)
    load_loss(routing).backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    gates = torch.zeros(T, E).scatter_add(1, routing.expert_ids, routing.weights * mask[:, None]).sum(0)
    assert torch.allclose(importance_loss(routing), cv_squared(gates), rtol=1e-5)


def test_without_noise_load_is_the_count() -> None:
    routing = router().eval()(torch.randn(T, D))
    assert torch.allclose(smooth_load(routing), routing.expert_counts().float())


def test_fresh_it_prefers_nobody_and_noise_decides() -> None:
    made = Router(CONFIG.model_copy(update={"init": "zeros"}), D).train()
    torch.manual_seed(0)
    counts = made(torch.randn(4000, D)).expert_counts()
    assert counts.min() > 0.9 * counts.float().mean() and counts.max() < 1.1 * counts.float().mean()


def test_a_layer_runs_it_on_every_token() -> None:
    layer = MoELayer(MoEConfig(router=CONFIG, moe_intermediate_size=8, hidden_act="relu"), D)
    y, routing = layer(torch.randn(2, 5, D))
    assert y.shape == (2, 5, D) and routing.rows(slice(2)).groups.expert_ids.shape == (2, 2)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_group": 1, "topk_group": 1}, "needs 2 to num_experts / 2 groups: n_group is 1"),
        ({"topk_group": 3}, "topk_group = 3 does not divide num_experts_per_tok = 4"),
        ({"score": "sigmoid"}, "leave score out"),
        ({"bias": True}, "leave bias out"),
        ({"select": "topk", "num_experts": 1 << 17}, "num_experts = 131072 exceeds 65536"),
    ],
)
def test_what_it_refuses(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        RouterConfig(**{**CONFIG.model_dump(), **changes})
