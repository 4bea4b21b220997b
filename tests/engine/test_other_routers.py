"""Routers that are more than the best k scores: the engine says what whole forwards say, and files keep every bit."""

from typing import Any

import pytest
import torch

from manyhands.checkpoint.model import load_model, save
from manyhands.config import ModelConfig, SamplingConfig
from manyhands.engine.engine import Engine
from manyhands.models import Decoder, init_weights

E = {"num_experts": 6, "num_experts_per_tok": 2}
ROUTERS: dict[str, dict[str, Any]] = {
    "ReMoE": {"router": {**E, "select": "positive", "score": "relu", "norm_topk_prob": False}},
    "Default MoE": {"router": {**E, "norm_topk_prob": False}, "unchosen": "average"},
    "DenseMixer": {"router": E, "unchosen": "gradient"},
    "SparseMixer": {"router": {**E, "select": "sparsemixer", "norm_topk_prob": False, "mixer_epsilon": 0.3}},
    "BASE": {"router": {**E, "num_experts_per_tok": 1, "select": "base", "score": "sigmoid"}},
    "Sinkhorn": {"router": {**E, "select": "sinkhorn", "norm_topk_prob": False}},
    "quantile": {"router": {**E, "score": "sigmoid", "bias": True, "bias_on": "logit"}},
}
PROMPTS = [[5, 6, 7], [9] * 7, [1]]
GREEDY = SamplingConfig(max_new_tokens=8, temperature=0.0, ignore_eos=True)


def make(name: str) -> Decoder:
    """Its buffers hold something, as after training."""
    fields = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    moe = {**ROUTERS[name], "moe_intermediate_size": 24, "first_k_dense_replace": 1}
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    model = Decoder(ModelConfig(**sizes, initializer_range=0.3, attention=fields, moe=moe))
    init_weights(model, seed=0)
    generator = torch.Generator().manual_seed(1)
    for buffer in model.buffers():
        buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.3 if buffer.dim() else 3.0)
    return model.eval()


@torch.no_grad()
def by_whole_forwards(model: Decoder, ids: list[int]) -> list[int]:
    """Without a cache."""
    found = list(ids)
    for _ in range(GREEDY.max_new_tokens):
        found.append(int(model(torch.tensor([found])).logits[0, -1].argmax()))
    return found[len(ids) :]


@pytest.mark.parametrize("name", ROUTERS)
def test_the_engine_generates_what_whole_forwards_give(name: str) -> None:
    model = make(name)
    expected = [by_whole_forwards(model, prompt) for prompt in PROMPTS]
    assert len({tuple(tokens) for tokens in expected}) == len(PROMPTS)
    for how in ({"max_sequences": 3}, {"max_sequences": 1}, {"max_sequences": 3, "max_batch_tokens": 4}):
        assert [c.token_ids for c in Engine(model, **how).generate(PROMPTS, GREEDY)] == expected


@pytest.mark.parametrize("name", ROUTERS)
def test_a_file_keeps_every_bit(name: str, tmp_path) -> None:
    model = make(name)
    save(model, tmp_path / "model", family="manyhands")
    again = load_model(tmp_path / "model")
    assert again.config == model.config
    right, found = model.state_dict(), again.state_dict()
    assert right.keys() == found.keys()
    assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in right.items())
    ids = torch.tensor([PROMPTS[1]])
    assert torch.equal(again(ids).logits, model(ids).logits)
