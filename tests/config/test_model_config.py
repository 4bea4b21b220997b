"""What a model description refuses, and how it says so: one line, the field, the value, what would be right."""

from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from manyhands.config import ModelConfig, MoEConfig, RouterConfig, parse
from manyhands.errors import ConfigError


def refusal(cls: Any, values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(cls, values)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    assert caught.value.exit_code == 2
    return message


def test_unknown_field_suggests_the_nearest() -> None:
    message = refusal(ModelConfig, {"moe": {"router": {"num_expert_per_tok": 2}}})
    assert message == "unknown field 'moe.router.num_expert_per_tok'; did you mean 'num_experts_per_tok'?"


def test_unknown_field_far_from_all_lists_what_is_allowed() -> None:
    message = refusal(RouterConfig, {"zzz": 1})
    assert (
        message.startswith("unknown field 'zzz'; allowed: bias, bias_on, capacity_factor, ") and "topk_group" in message
    )


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_experts": 4, "num_experts_per_tok": 5}, "num_experts_per_tok = 5 exceeds num_experts = 4"),
        ({"num_experts": 10, "n_group": 4}, "n_group = 4 does not divide num_experts = 10"),
        ({"n_group": 2, "topk_group": 3}, "topk_group = 3 exceeds n_group = 2"),
        ({"num_experts_per_tok": 3, "n_group": 4, "topk_group": 1}, "exceeds the 2 experts"),
        ({"random_second": True, "num_experts_per_tok": 3}, "random_second needs num_experts_per_tok = 2, not 3"),
        ({"select": "hash", "num_experts_per_tok": 2}, "num_experts_per_tok = 1, not 2"),
        ({"select": "expert_choice", "bias": True}, "bias has no meaning with select = 'expert_choice'"),
        ({"select": "expert_choice", "noisy": True}, "noisy has no meaning"),
        ({"select": "expert_choice", "n_group": 2, "topk_group": 2}, "n_group has no meaning"),
        ({"select": "expert_choice", "capacity_factor": 1.0}, "leave the capacity out"),
        ({"select": "topkk"}, "select = 'topkk'"),
        ({"jitter": 1.0}, "jitter = 1.0"),
        ({"capacity_factor": 0.0}, "capacity_factor = 0.0"),
    ],
)
def test_routers_that_cannot_be(values: dict[str, Any], words: str) -> None:
    assert words in refusal(RouterConfig, values)


HOSTILE: list[Any] = [10**12, 10**400, -1, 0, float("nan"), float("inf"), "many", [], {}, None, 2.5]


@pytest.mark.parametrize("value", HOSTILE, ids=lambda v: repr(v)[:12])
@pytest.mark.parametrize("field", ["num_experts", "num_experts_per_tok", "n_group"])
def test_hostile_router_sizes(field: str, value: Any) -> None:
    assert field in refusal(RouterConfig, {field: value})


@pytest.mark.parametrize("value", HOSTILE, ids=lambda v: repr(v)[:12])
@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"])
def test_hostile_model_sizes(field: str, value: Any) -> None:
    assert refusal(ModelConfig, {field: value}).startswith(f"{field} = ")


def test_unprintable_integers() -> None:
    """Python refuses to print integers beyond 4300 digits; the refusal must not fail on that."""
    assert "an integer of 20000 bits" in refusal(ModelConfig, {"hidden_size": (1 << 20000) - 1})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"attention": {"num_attention_heads": 6, "num_key_value_heads": 4}},
            "num_key_value_heads = 4 does not",
        ),
        ({"attention": {"head_dim": 7}}, "must be even"),
        ({"attention": {"kind": "mla", "qk_rope_head_dim": 5}}, "must be even"),
        ({"attention": {"kind": "mla", "qk_norm": "head"}}, "qk_norm cannot be used with kind = 'mla'"),
        ({"attention": {"kind": "mla", "num_key_value_heads": 2}}, "no meaning with kind = 'mla'"),
        ({"rope": {"rope_type": "yarn", "factor": 4}}, "needs original_max_position_embeddings"),
        ({"rope": {"rope_theta": float("nan")}}, "rope.rope_theta = nan"),
        ({"rope": {"beta_slow": 0}}, "rope.beta_slow = 0"),
        ({"moe": {"shared_expert_gate": True}}, "shared_expert_gate needs n_shared_experts"),
        ({"moe": {"first_k_dense_replace": 4}}, "no layer is sparse"),
        ({"moe": 7}, "moe = 7"),
        ({"hidden_act": "swish"}, "'swiglu'"),
    ],
)
def test_models_that_cannot_be(values: dict[str, Any], words: str) -> None:
    assert words in refusal(ModelConfig, values)


def test_several_mistakes_are_counted() -> None:
    assert refusal(ModelConfig, {"hidden_size": -1, "vocab_size": -1}).endswith("(and 1 more)")


def test_configs_are_frozen() -> None:
    with pytest.raises(ValidationError):
        RouterConfig().num_experts = 9  # type: ignore[misc]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"first_k_dense_replace": 2}, [2, 3, 4, 5]),
        ({"decoder_sparse_step": 2}, [1, 3, 5]),
        ({"decoder_sparse_step": 4, "first_k_dense_replace": 1}, [3]),
    ],
)
def test_which_layers_are_sparse(fields: dict[str, int], expected: list[int]) -> None:
    config = ModelConfig(num_hidden_layers=6, moe=MoEConfig(**fields))
    assert config.sparse_layers == expected
    assert [layer for layer in range(6) if config.is_sparse(layer)] == expected
    assert ModelConfig(num_hidden_layers=6).sparse_layers == []


@pytest.mark.parametrize("router", [{}, {"capacity_factor": 1.0}, {"noisy": True}])
def test_causal(router: dict[str, Any]) -> None:
    assert RouterConfig(**router).causal_safe


@pytest.mark.parametrize("router", [{"eval_capacity_factor": 2.0}, {"select": "expert_choice"}])
def test_not_causal(router: dict[str, Any]) -> None:
    assert not RouterConfig(**router).causal_safe


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (
            lambda: RouterConfig(num_expert_per_tok=2),
            "RouterConfig: unknown field 'num_expert_per_tok'; did you mean 'num_experts_per_tok'?",
        ),
        (lambda: MoEConfig(router={"num_experts": 0}), "MoEConfig: router.num_experts = 0: "),
        (
            lambda: ModelConfig(moe={"router": {"scor": "sigmoid"}}),
            "ModelConfig: unknown field 'moe.router.scor'; did you mean 'score'?",
        ),
        (lambda: RouterConfig(num_experts=2, num_experts_per_tok=4), "num_experts_per_tok = 4 exceeds num_experts = 2"),
    ],
)
def test_the_library_says_what_the_command_line_says(make: Callable[[], object], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert line in str(caught.value) and "\n" not in str(caught.value) and "pydantic" not in str(caught.value)
