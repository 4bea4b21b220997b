"""What training holds: states against the built optimisers, activations against what autograd keeps."""

import json
from math import prod

import pytest
import torch

from manyhands.catalog import load
from manyhands.config import ModelConfig, RunConfig
from manyhands.config.load import load_preset
from manyhands.models import build, init_weights
from manyhands.plan.training_memory import OPTIMIZERS, activations, held, known
from manyhands.train.optim import build_optimizers

from ..small_runs import manyhands

SHAPES = {
    "experts, norms of queries and keys": [],
    "grouped heads": ["model.attention={kind: gqa, num_attention_heads: 4, num_key_value_heads: 2, head_dim: 32}"],
    "many narrow experts": ["model.moe.router.num_experts=32", "model.moe.router.num_experts_per_tok=8"],
    "wide": ["model.hidden_size=160", "model.moe.moe_intermediate_size=96"],
    "nearly dense": ["model.moe.first_k_dense_replace=3"],
}


def of(changes: list[str]) -> RunConfig:
    return load_preset("quickstart", changes)


def decoder(run: RunConfig) -> ModelConfig:
    assert isinstance(run.model, ModelConfig)
    return run.model


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("tied", ["true", "false"])
def test_states_are_the_optimisers(optimizer: str, tied: str) -> None:
    """To the byte, but for the counters of steps."""
    run = of([f"optim.name={optimizer}", f"model.tie_word_embeddings={tied}", "model.vocab_size=300"])
    model = build(run.model, "eager")
    init_weights(model, 0)
    optimizers = build_optimizers(model, run.optim)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizers.step()
    kept = sum(t.numel() for name, t in optimizers.state_dict().items() if not name.endswith(".step"))
    found = held(decoder(run), optimizer, 1)
    assert found.moments == 4 * kept and found.weights == found.gradients == 4 * sum(
        p.numel() for p in model.parameters()
    )


def measured(run: RunConfig, sequences: int, length: int) -> tuple[int, int]:
    """Bytes that autograd keeps of the blocks, in bfloat16: activations, and matrices that were cast."""
    model = build(run.model, "grouped_mm")
    init_weights(model, 0)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    matrices = {p.numel() for name, p in model.named_parameters() if p.ndim > 1 and "router" not in name}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.hidden(torch.zeros(sequences, length, dtype=torch.int64), dtype=torch.bfloat16)
    assert hidden.states.requires_grad
    sizes = [(t.untyped_storage().nbytes(), t.dtype) for t in kept.values()]
    cast = sum(n for n, dtype in sizes if dtype == torch.bfloat16 and n // 2 in matrices)
    return sum(n for n, _ in sizes) - cast, cast


@pytest.mark.parametrize("shape", SHAPES)
def test_activations_are_what_autograd_keeps(shape: str) -> None:
    run = of(SHAPES[shape])
    found, cast = measured(run, 3, 67)
    assert activations(decoder(run), 3 * 67) == pytest.approx(found, rel=0.05)
    assert held(decoder(run), "adamw", 1).blocks == cast


def test_devices_share_states_and_gather_two_blocks() -> None:
    config = load("qwen3-30b-a3b").config
    assert config is not None
    one, many, apart = (held(config, "adamw", 4096, devices=n, ep=ep) for n, ep in ((1, 1), (16, 1), (16, 8)))
    assert many.weights == one.weights / 16 and many.moments == one.moments / 16
    experts, layers = 128 * 3 * 2048 * 768, config.num_hidden_layers
    assert one.blocks / layers == many.blocks / 2 and many.activations == one.activations
    assert many.blocks - apart.blocks == pytest.approx(2 * 2 * experts * (1 - 1 / 8))
    again = held(config, "adamw", 4096, recompute=True)
    assert again.activations is not None and one.activations is not None and one.total is not None
    enters = 2 * 4096 * config.hidden_size * layers
    assert again.activations > enters + one.activations / layers and again.activations < one.activations / 10
    assert one.total == one.weights + one.gradients + one.moments + one.blocks + one.activations


def test_what_is_not_known_is_not_said() -> None:
    for name in ("deepseek-v3", "gpt-oss-20b"):
        config = load(name).config
        assert config is not None and not known(config)
        assert activations(config, 10) is None and held(config, "muon", 10).total is None


def test_the_command() -> None:
    asked = ["plan", "qwen3-30b-a3b", "--train-memory", "--context", "4k"]
    done = manyhands(*asked, "--machine", "8xh200", "--ep", "8", "--batch", "2", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["sections"]["training_memory"]["table"]
    config = load("qwen3-30b-a3b").config
    assert config is not None
    for row in rows:
        expected = held(config, row["optimizer"], 8192, devices=8, ep=8)
        assert row["moments"]["value"] == expected.moments and row["together"]["value"] == expected.total
    assert [row["optimizer"] for row in rows] == list(OPTIMIZERS) and prod(len(row) for row in rows) == 9**3
    for arguments, said in (
        (["--ep", "3", "--machine", "8xh200"], "--ep 3 does not divide"),
        (["--ep", "2"], "--ep 2 does not divide the 1 device"),
        (["--versus", "mixtral-8x7b"], "is about one model"),
    ):
        done = manyhands(*asked, *arguments)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done
    done = manyhands("plan", "qwen3-30b-a3b", "--ep", "8", "--machine", "8xh200")
    assert done.returncode == 2 and "--ep goes with --train-memory" in done.stderr
