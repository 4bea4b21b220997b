"""A good small checkpoint of a published family, ways to spoil it, and what every loader must make of the result."""

import json
import os
import re
import resource
import shutil
import time

import pytest

from manyhands.checkpoint.model import load, load_model, save
from manyhands.checkpoint.source import open_source
from manyhands.config import ModelConfig, parse
from manyhands.errors import CheckpointError
from manyhands.models import Decoder, init_weights
from manyhands.text import Tokenizer

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NORM, GATE = "model.norm.weight", "model.layers.0.block_sparse_moe.gate.weight"
EXPERT = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
VALUES = {
    "vocab_size": 280,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "intermediate_size": 8,
    "attention": {"num_attention_heads": 2, "head_dim": 8},
    "rope": {"rope_theta": 1e6},
    "moe": {"router": {"num_experts": 4, "num_experts_per_tok": 2}, "moe_intermediate_size": 8},
}
FITTING = {  # what a family cannot say otherwise
    "qwen3_moe": {"attention": {"num_attention_heads": 2, "head_dim": 8, "qk_norm": "head"}},
    "olmoe": {
        "attention": {"num_attention_heads": 2, "head_dim": 8, "qk_norm": "full"},
        "moe": {**VALUES["moe"], "router": {**VALUES["moe"]["router"], "norm_topk_prob": False}},
    },
    "deepseek_v3": {
        "attention": {
            "kind": "mla",
            "num_attention_heads": 2,
            **dict.fromkeys(("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 4),
            "latent_norm_eps": 1e-6,
        },
        "moe": {**VALUES["moe"], "router": {**VALUES["moe"]["router"], "score": "sigmoid", "bias": True}},
    },
    "gpt_oss": {
        "attention": {
            "num_attention_heads": 2,
            "head_dim": 8,
            "sinks": True,
            "attention_bias": True,
            "output_bias": True,
            "sliding_window": 4,
            "layer_types": ("sliding_attention", "full_attention"),
        },
        "hidden_act": "swiglu_oai",
        "moe": {
            "router": {**VALUES["moe"]["router"], "logit_bias": True},
            "moe_intermediate_size": 8,
            "hidden_act": "swiglu_oai",
            "expert_bias": True,
        },
    },
}
FITTING["kimi_k25"] = FITTING["deepseek_v3"]
MiB = 1 << 20


def make(folder, shard_size=None, family="mixtral", **fields):
    """A checkpoint with a tokenizer and, as models from elsewhere, without a manifest."""
    model = Decoder(parse(ModelConfig, VALUES | fields))
    init_weights(model, seed=1)
    tokenizer = Tokenizer.train(["def f(x):\n    return x\n"], 270)
    options = {} if shard_size is None else {"max_shard_size": shard_size}
    save(model, folder, tokenizer, family=family, **options)
    (folder / "manifest.json").unlink()
    return folder


def copy(source, to):
    shutil.copytree(source, to)
    return to


def split(path):
    """Header and data of a safetensors file."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def join(path, header, data, size=None):
    """Write a safetensors file; a header that is no object is written as it stands."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if size is None else size).to_bytes(8, "little") + text + data)


def edit(path, **fields):
    """Change fields of a JSON file; `...` deletes one."""
    values = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))


def refused(directory, message, loaders=(open_source, load_model, load), seconds=1.0):
    """Every loader says in one line, soon and with little memory, what is wrong in which file."""
    for loader in loaders:
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        with pytest.raises(CheckpointError) as caught:
            loader(directory)
        assert time.process_time() - start < seconds
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024
        text = str(caught.value)
        assert re.search(message, text), text
        assert len(text) < 1000 and str(directory) in text and text.isprintable(), text


def fifo(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def link(path, target):
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def nested(depth):
    """A list in a list, `depth` deep."""
    return json.loads("[" * depth + "]" * depth)
