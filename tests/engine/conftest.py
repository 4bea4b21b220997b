"""A tokenizer and toy models whose next tokens are far enough apart for greedy choices to be stable."""

import pytest
import torch

from manyhands.config import ModelConfig, parse
from manyhands.models import Decoder, init_weights
from manyhands.text import Tokenizer

GQA = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "qk_norm": "head"}
MLA = {"kind": "mla", "num_attention_heads": 2, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8}
ATTENTION = {
    "gqa": GQA,
    "window": {**GQA, "sliding_window": 5},
    "mla": {**MLA, "v_head_dim": 8},
}


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.train(["def f(x):\n    return x + 1\n", "für Élise, naïve café ☕ 🙂 " * 3] * 5, 300)


def build(attention=GQA, moe=None, **fields):
    moe = {"router": {"num_experts": 4, "num_experts_per_tok": 2}, "moe_intermediate_size": 16, **(moe or {})}
    values = {
        "vocab_size": 320,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "intermediate_size": 48,
        "max_position_embeddings": 48,
        "initializer_range": 0.3,
        "attention": attention,
        "moe": {**moe, "first_k_dense_replace": 1},
        **fields,
    }
    model = Decoder(parse(ModelConfig, values))
    init_weights(model, seed=1)
    return model.eval()


@pytest.fixture
def make():
    """`make(attention=…, moe=…, **fields)` -> a Decoder in evaluation mode; layer 0 dense, layers 1 and 2 sparse."""
    return build


@pytest.fixture(params=ATTENTION)
def model(request):
    torch.manual_seed(0)
    return build(ATTENTION[request.param])
