"""What a session says when it begins."""

from typing import Any

import pytest
import torch

from manyhands.config import EncoderDecoderConfig, ModelConfig, MoEConfig, RouterConfig, RunConfig, TrainConfig
from manyhands.kernels.native import library
from manyhands.train import opening
from manyhands.train.opening import not_causal, without_kernels

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


def test_missing_kernels_are_said_where_they_would_have_been_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "missing", lambda: "no library")
    cpu, moe = torch.device("cpu"), ModelConfig(moe=MoEConfig(router=RouterConfig(num_experts=4)))
    run = RunConfig(model=moe)
    said = without_kernels(run, cpu)
    assert said is not None and said.endswith(": no library") and "\n" not in said
    assert without_kernels(run, torch.device("cuda")) is None
    assert without_kernels(RunConfig(model=moe, train=TrainConfig(experts_implementation="eager")), cpu) is None
    assert without_kernels(RunConfig(model=ModelConfig(moe=None)), cpu) is None
    monkeypatch.setattr(opening, "missing", lambda: None)
    assert without_kernels(run, cpu) is None


def test_an_install_without_the_library_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "NAME", "none.so")
    reason = library._here.__wrapped__()
    assert isinstance(reason, str) and "pip install" in reason and "--no-cache-dir" in reason
