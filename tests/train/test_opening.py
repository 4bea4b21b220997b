"""What a session says when it begins."""

from typing import Any

import pytest

from manyhands.config import EncoderDecoderConfig, ModelConfig, MoEConfig, RouterConfig
from manyhands.train.opening import not_causal

ROOM: dict[str, Any] = {"capacity_tokens": 8, "capacity_per": "sequence"}


@pytest.mark.parametrize(
    ("fields", "decoder", "pair"),
    [
        ({}, None, None),
        ({"capacity_factor": 2.0}, None, None),
        ({"num_experts_per_tok": 1, **ROOM}, "the tokens before", "counts each token by itself"),
        ({"eval_capacity_factor": 2.0}, "the later ones too", "counts each token by itself"),
        ({"select": "expert_choice"}, "the later ones too", "generate will refuse it"),
    ],
)
def test_a_router_that_looks_at_other_tokens(fields: dict[str, Any], decoder: str | None, pair: str | None) -> None:
    router = RouterConfig(num_experts=4, **({"num_experts_per_tok": 2} | fields))
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_decoder_layers": 1, "intermediate_size": 16}
    heads = {"num_attention_heads": 1, "head_dim": 16, "num_sparse_encoder_layers": 1}
    for config, says in (
        (ModelConfig(moe=MoEConfig(router=router)), decoder),
        (EncoderDecoderConfig(vocab_size=64, router=router, **sizes, **heads), pair),
    ):
        warning = not_causal(config)
        assert warning is None if says is None else warning is not None and says in warning
