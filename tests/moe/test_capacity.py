"""Room per expert in every batch, sequence or group, in tokens or as a factor."""

import pytest
import torch

from manyhands.config import ModelConfig, MoEConfig, RouterConfig
from manyhands.config.base import parse
from manyhands.engine.refuse import check_causal
from manyhands.errors import ConfigError, UserError
from manyhands.moe.capacity import apply_capacity, capacity

from .make_routing import make_layer, make_router, tokens

ALL_TO_ONE = torch.zeros(12, 1, dtype=torch.int64), torch.ones(12, 1), torch.ones(12, 1, dtype=torch.bool)


def kept(mask: list[bool] | None = None, sequence_length: int | None = None, **fields: object) -> list[int]:
    """Which of 12 tokens, all of which want expert 0, have room."""
    config = RouterConfig.model_validate({"num_experts": 2, "num_experts_per_tok": 1, "min_capacity": 0} | fields)
    mask_T = torch.ones(12, dtype=torch.bool) if mask is None else torch.tensor(mask)
    found = apply_capacity(*ALL_TO_ONE, mask_T, config, config.capacity_factor, sequence_length)
    return found.flatten().nonzero().flatten().tolist()


def test_every_sequence_has_room_of_its_own() -> None:
    assert kept(capacity_factor=1.0) == [0, 1, 2, 3, 4, 5]
    assert kept(capacity_factor=1.0, capacity_per="sequence", sequence_length=4) == [0, 1, 4, 5, 8, 9]
    assert kept(capacity_tokens=1, capacity_per="sequence", sequence_length=6) == [0, 6]
    assert kept(capacity_tokens=3, capacity_per="sequence") == [0, 1, 2], "tokens without sequences are one"


def test_the_last_group_may_be_smaller() -> None:
    assert kept(capacity_factor=1.0, capacity_per="group", capacity_group=5) == [0, 1, 5, 6, 10]
    assert kept(capacity_tokens=1, capacity_per="group", capacity_group=5) == [0, 5, 10]


def test_padding_takes_no_room_in_its_group_and_makes_none() -> None:
    mask = [False, True, True, True] + [True] * 4 + [False] * 3 + [True]
    per_sequence = {"capacity_per": "sequence", "sequence_length": 4}
    assert kept(mask, capacity_tokens=1, **per_sequence) == [1, 4, 11]
    assert kept(mask, capacity_factor=1.0, **per_sequence) == [1, 4, 5], "room of ⌊3/2⌋, ⌊4/2⌋ and ⌊1/2⌋"
    assert kept([False] * 12, capacity_tokens=3) == []


def test_tokens_are_room_in_training_and_in_evaluation() -> None:
    layer = make_layer(router={"num_experts_per_tok": 1, "capacity_tokens": 1, "capacity_per": "sequence"})
    x = tokens(1, 1, 8).expand(3, 5, 8)  # every token alike
    for training in (True, False):
        _, routing = layer.train(training)(x)
        assert routing.kept.view(3, 5).tolist() == [[True] + [False] * 4] * 3


def test_room_is_never_more_than_the_tokens_and_counts_per_group() -> None:
    config = RouterConfig(num_experts=8, num_experts_per_tok=2, min_capacity=2)
    assert capacity(torch.tensor([64, 7, 1, 0]), config, 1.25).tolist() == [20, 2, 1, 0]
    fixed = RouterConfig(capacity_tokens=4)
    assert capacity(torch.tensor([64, 3, 0]), fixed, None).tolist() == [4, 3, 0]


def test_one_sequence_does_not_see_another() -> None:
    fields = {"num_experts": 4, "capacity_tokens": 2, "capacity_per": "sequence"}
    layer = make_layer(router=fields).eval()
    x, other = tokens(3, 9, 8), tokens(3, 9, 8, seed=5)
    other[1] = x[1]
    assert torch.equal(layer(x)[0][1], layer(other)[0][1])


def routes_alike(fields: dict[str, object]) -> bool:
    """Whether tokens 0–5 have the same room whatever stands after them; 40 draws of 12 tokens."""
    router = make_router(num_experts=3, **fields).eval()
    x = tokens(40, 12, 8)
    longer = torch.cat((x[:, :6], tokens(40, 18, 8, seed=3)), 1)
    first, second = (torch.stack([router(row, sequence_length=len(row)).kept[:6] for row in t]) for t in (x, longer))
    return torch.equal(first, second)


@pytest.mark.parametrize(
    "fields",
    [
        {"capacity_tokens": 2, "num_experts_per_tok": 1},
        {"capacity_tokens": 2, "num_experts_per_tok": 2},
        {"capacity_tokens": 2, "num_experts_per_tok": 1, "drop_policy": "probability"},
        {"eval_capacity_factor": 0.5, "num_experts_per_tok": 1, "min_capacity": 1},
    ],
)
def test_prefix_causal_is_said_of_what_later_tokens_do_not_change(fields: dict[str, object]) -> None:
    config = RouterConfig.model_validate({"num_experts": 3, "capacity_per": "sequence"} | fields)
    assert not config.causal_safe
    assert routes_alike({"capacity_per": "sequence"} | fields) == config.prefix_causal


def test_prefix_causal_is_not_enough_to_decode() -> None:
    """A token by itself finds an empty expert, where in the sequence it found a full one."""
    router = make_router(num_experts=2, num_experts_per_tok=1, capacity_tokens=1, capacity_per="sequence").eval()
    assert router.config.prefix_causal
    x = tokens(8, 8)
    assert not router(x).kept.all() and all(router(token[None]).kept.all() for token in x)


@pytest.mark.parametrize(
    ("router", "says"),
    [
        ({"capacity_tokens": 4}, "capacity_tokens = 4.*the tokens beside it; set capacity_tokens to null"),
        ({"capacity_tokens": 4, "capacity_per": "sequence", "num_experts_per_tok": 1}, "the tokens before it"),
        ({"eval_capacity_factor": 1.5}, "eval_capacity_factor = 1.5.*set eval_capacity_factor to null"),
    ],
)
def test_generation_refuses_and_says_why(router: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        check_causal(ModelConfig(moe=MoEConfig(router=RouterConfig.model_validate(router))))
    check_causal(ModelConfig(moe=MoEConfig(router=RouterConfig(capacity_factor=1.0))))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"capacity_tokens": 4, "capacity_factor": 1.0}, "leave capacity_factor and eval_capacity_factor out"),
        ({"capacity_tokens": 4, "eval_capacity_factor": 1.0}, "capacity_tokens says the room"),
        ({"capacity_tokens": 0}, "capacity_tokens"),
        ({"capacity_per": "group"}, "capacity_group = None"),
        ({"capacity_group": 64}, "groups of tokens have capacity_per = 'group'"),
        ({"capacity_per": "sequence", "capacity_group": 64}, "capacity_per = 'sequence'"),
        ({"capacity_per": "groups"}, "capacity_per"),
        ({"select": "expert_choice", "capacity_tokens": 4}, "leave the capacity out"),
    ],
)
def test_a_capacity_that_means_nothing_is_refused(fields: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse(RouterConfig, fields)
