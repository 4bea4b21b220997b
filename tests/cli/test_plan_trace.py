"""`manyhands plan --trace`: a forecast from recorded routing is the policy's own count on it."""

import json

import numpy as np
import pytest

from manyhands.store.policies import Lfu
from manyhands.trace.part import Phase
from manyhands.trace.recording import Recorder

from ..small_runs import manyhands

CONFIG = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 4096,
    "num_local_experts": 16,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
}
EXPERT = 3 * 1024 * 2048 * 9 // 16
"""Bytes at 4.5 bits."""


@pytest.fixture
def files(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((200, 3, 16)) + np.linspace(0, 1.5, 16), axis=-1)[..., :2]
    with Recorder(tmp_path / "trace", layers=[0, 1, 2], num_experts=16, num_experts_per_tok=2, recorded=()) as recorder:
        recorder.add_arrays(ids, sequence=0, position=np.arange(200), phase=Phase.DECODE, step=np.arange(200))
    return tmp_path / "config.json", tmp_path / "trace", ids


def forecast(*arguments):
    done = manyhands("plan", *map(str, arguments), "--format", "int4", "--prompt", "64", "--disk", "1GB/s", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["sections"]["budget"]
    return {figure["label"]: figure["value"] for figure in found["figures"]}, " ".join(found["notes"])


def memory_for(config, experts, *more):
    """`--memory` with room for so many of 48 experts."""
    values, _ = forecast(config, "--memory", "4GB", *more)
    return "--memory", str(round(values["all but experts"] + experts * EXPERT))


def test_the_hit_rate_is_the_policys_own(files):
    config, trace, ids = files
    values, notes = forecast(config, *memory_for(config, 12), "--trace", trace)
    policy, hits = Lfu(int(values["left for experts"]), (EXPERT,) * 3), 0
    for step in ids:
        hits += sum(len(policy.want(layer, sorted(experts)).hits) for layer, experts in enumerate(step.tolist()))
        policy.end_step()
    assert values["of all experts"] == pytest.approx(0.25, rel=1e-6)
    assert values["hit rate"] == pytest.approx(hits / ids.size)
    assert values["from disk, per token"] == pytest.approx((1 - values["hit rate"]) * 6 * EXPERT)
    assert "200 tokens of" in notes and "three recorded models" not in notes
    assumed, notes = forecast(config, *memory_for(config, 12))
    assert assumed["hit rate"] != values["hit rate"] and "three recorded models" in notes


def test_sequences_in_step_share_experts(files):
    config, trace, _ = files
    alone, _ = forecast(config, *memory_for(config, 24), "--trace", trace)
    batch = ("--batch", "8")
    eight, _ = forecast(config, *memory_for(config, 24, *batch), "--trace", trace, *batch)
    assert alone["experts of one step"] < eight["experts of one step"] < 8 * alone["experts of one step"]
    assert eight["from disk, per token"] < alone["from disk, per token"]


def test_a_trace_of_another_model_is_refused(files):
    _, trace, _ = files
    done = manyhands("plan", "mixtral-8x7b", "--memory", "9GB", "--disk", "1GB/s", "--trace", str(trace))
    assert done.returncode == 2 and "3 layers of 16 experts, 2 per token" in done.stderr
    done = manyhands("plan", "mixtral-8x7b", "--trace", str(trace))
    assert done.returncode == 2 and "--trace goes with --memory" in done.stderr
