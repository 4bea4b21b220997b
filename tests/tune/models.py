"""Small models that are grown and shrunk."""

from pathlib import Path

import torch

from manyhands.checkpoint.model import save
from manyhands.config import ModelConfig, parse
from manyhands.models import Decoder, init_weights
from manyhands.text import Tokenizer

from ..checkpoint.hostile import FITTING, VALUES

TEXT = ["def f(x):\n    return x + 1\n", "the hands are many, and each of them does its part\n"]


def written(
    model: Decoder, folder: Path, family: str, tokenizer: bool = True, dtype: torch.dtype | None = None
) -> Path:
    """A checkpoint with a tokenizer of 270 tokens and, as models from elsewhere, without a manifest."""
    save(model, folder, Tokenizer.train(TEXT, 270) if tokenizer else None, family=family, dtype=dtype)
    (folder / "manifest.json").unlink()
    return folder


def dense(family: str = "llama", **fields: object) -> Decoder:
    """A dense model whose logits are far from 0."""
    attention = {"num_attention_heads": 2, "head_dim": 8, "qk_norm": "head" if family == "qwen3" else "none"}
    values = {
        "vocab_size": 280,
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "intermediate_size": 24,
        "initializer_range": 0.3,
        "attention": attention,
        "rope": {"rope_theta": 1e4},
    }
    model = Decoder(parse(ModelConfig, values | fields)).eval()
    init_weights(model, seed=3)
    return model


def mixture(family: str = "mixtral", experts: int = 8, **router: object) -> Decoder:
    """A mixture of 8 experts, 2 per token, whose experts matter."""
    fields = VALUES | {"initializer_range": 0.3} | FITTING.get(family, {})
    shared = {"n_shared_experts": 1} if family == "deepseek_v3" else {}  # transformers has them in any case
    moe = {**fields["moe"], **shared, "router": {**fields["moe"]["router"], "num_experts": experts, **router}}
    model = Decoder(parse(ModelConfig, fields | {"moe": moe})).eval()
    init_weights(model, seed=5)
    with torch.no_grad():
        for layer in model.sparse_layers().values():
            layer.router.weight.mul_(3.0)  # some experts are chosen more than others
            if layer.router.e_score_correction_bias is not None:
                layer.router.e_score_correction_bias.copy_(torch.linspace(-0.05, 0.05, experts))
    return model


@torch.no_grad()
def spoken(model: Decoder, rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """[rows, length + 1] ids drawn from the model itself: no other model predicts them better."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 270, (rows, 1), generator=draw)
    for _ in range(length):
        logits = model(ids).logits[:, -1, :270]
        ids = torch.cat((ids, torch.multinomial(logits.softmax(-1), 1, generator=draw)), 1)
    return ids
