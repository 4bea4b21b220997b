"""A tiny model behind a real socket, in this process."""

import contextlib

import pytest
import torch

from manyhands.config import ModelConfig, parse
from manyhands.engine.engine import Engine
from manyhands.engine.service import Service
from manyhands.models import Decoder, init_weights
from manyhands.serve.models import Entry, Models
from manyhands.serve.served import Served
from manyhands.text import Tokenizer

from .running import Running

CONTEXT = 192
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% for t in tools or [] %}{{ t | tojson }}\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer():
    texts = ["def f(x):\n    return x + 1\n", "für Élise, naïve café ☕ 🙂 <user>Hello the hands" * 3] * 5
    return Tokenizer.train(texts, 320)


@pytest.fixture(scope="session")
def model():
    torch.manual_seed(0)
    values = {
        "vocab_size": 330,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "intermediate_size": 48,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.3,
        "attention": {"num_attention_heads": 2, "head_dim": 16, "qk_norm": "head"},
        "moe": {
            "router": {"num_experts": 6, "num_experts_per_tok": 2},
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
        },
    }
    built = Decoder(parse(ModelConfig, values))
    init_weights(built, seed=1)
    return built.eval()


@pytest.fixture(scope="session")
def serving(model, tokenizer):
    """`with serving(…) as running`: a server of the tiny model, each time with an engine of its own."""

    @contextlib.contextmanager
    def start(name="tiny", max_waiting=16, timeout=None, engine=None, template=TEMPLATE, **how):
        used = tokenizer if template is None else tokenizer.with_chat_template(template)
        values = {"max_sequences": 4, "max_batch_tokens": 64, "keep_routing": True, **(engine or {})}
        service = Service(Engine(model, used, **values), max_waiting=max_waiting)
        service.start()
        served = Served(name, service, used, model.config, timeout)
        running = Running(Models([Entry(name, lambda: served, 1, served)]), **how)
        try:
            yield running
        finally:
            running.stop()

    return start


@pytest.fixture(scope="module")
def server(serving):
    """One for the tests of a file that leave it as it is."""
    with serving() as running:
        yield running
