"""Chosen parameters: patterns are strict; what is frozen has no gradient, no state, no decay, and stays bit for bit."""

from pathlib import Path

import pytest
import torch

from manyhands.checkpoint.runs import RunDirectory
from manyhands.checkpoint.state import load_tensors
from manyhands.errors import ConfigError
from manyhands.models import Decoder, init_weights
from manyhands.trace.journal import read_journal
from manyhands.train import loop
from manyhands.train.guard import SpikeGuard
from manyhands.train.optim import build_optimizers
from manyhands.train.step import train_step
from manyhands.train.trainable import chosen, freeze

from ..small_runs import SMALL, manyhands, small_run, write_text

NAMES = [
    "embed_tokens.weight",
    "layers.0.mlp.up_proj.weight",
    "layers.1.mlp.router.weight",
    "layers.1.mlp.experts.down",
]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["*"], NAMES),
        (["layers.*.experts.*"], NAMES[3:]),
        (["*.mlp.*", "!*router*"], [NAMES[1], NAMES[3]]),
        (["!*router*", "*.mlp.*"], [NAMES[1], NAMES[3]]),  # the order does not matter
        (["!embed_tokens.*"], NAMES[1:]),
        (["embed_tokens.weight", "layers.[01].mlp.up*"], NAMES[:2]),
    ],
)
def test_patterns(patterns: list[str], expected: list[str]) -> None:
    assert chosen(NAMES, patterns) == set(expected)


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        (["*.exprts.*"], r"trainable: '\*\.exprts\.\*' matches no parameter; near: layers\.1\.mlp\.experts\.down"),
        (["*", "!layers.1.mlp.ruoter.weight"], r"'!layers\.1\.mlp\.ruoter\.weight' .* near: layers\.1\.mlp\.router"),
        (["*.mlp.*", "!layers.*"], "leaves nothing to train"),
        (["Embed_tokens.*"], "matches no parameter; near: embed_tokens.weight"),
    ],
)
def test_mistakes(patterns: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        chosen(NAMES, patterns)


@pytest.mark.parametrize("optimiser", ["muon", "adamw"])
@pytest.mark.parametrize("backend", ["auto", "eager", "grouped_mm"])
@pytest.mark.parametrize(
    "patterns",
    [["layers.*.experts.*"], ["*router*"], ["!embed_tokens.*", "!*.self_attn.*", "!*router*"], ["norm.weight"]],
)
def test_the_frozen_stay_and_the_others_learn_as_they_would(optimiser: str, backend: str, patterns: list[str]) -> None:
    """QK-Clip and the router's bias leave them alone too. The first gradients are those of a run that trains all."""
    settings = ["model.attention.qk_norm=none", "optim.qk_clip=0.0001", "train.recompute=true"]
    run = small_run(
        Path("unused"), f"optim.name={optimiser}", "optim.weight_decay=0.5", "balance.bias_update_rate=0.05", *settings
    )
    ids = torch.randint(0, 300, (4, 33), generator=torch.Generator().manual_seed(0))
    gradients: list[dict[str, torch.Tensor]] = []
    for some in (["*"], patterns):
        model = Decoder(run.model, backend)
        init_weights(model, 0)
        freeze(model, some)
        optimizers, guard = build_optimizers(model.train(), run.optim), SpikeGuard(run.guard)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for number in (1, 2, 3):
            train_step(model, optimizers, guard, ids, run, number, 1e-2, torch.float32)
            if number == 1:
                gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    trained = chosen(dict(model.named_parameters()), patterns)
    assert gradients[1].keys() == trained
    for name, gradient in gradients[1].items():
        atol = 1e-5 * float(gradients[0][name].abs().max())
        torch.testing.assert_close(gradient, gradients[0][name], rtol=0, atol=atol)
    assert {name.rpartition(".")[0] for name in optimizers.state_dict()} == trained
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    biases = {name for name in before if name.endswith("e_score_correction_bias")}
    assert moved - biases == trained
    assert moved & biases == (biases if any("router" in name for name in trained) else set())


def test_a_run_of_some_resumes_bit_for_bit_and_says_how_many(tmp_path: Path) -> None:
    text = write_text(tmp_path)
    chosen = "trainable=['layers.*.experts.*', '!*.down_proj']"
    changes = [*SMALL, f"data.sources=['{text}']", chosen, "train.max_steps=1"]
    said = manyhands("train", "--preset", "tiny", "--out", str(tmp_path / "cli"), *changes)
    start = read_journal(tmp_path / "cli" / "journal.jsonl")[0]
    trained = 8 * 2 * 16 * 32
    assert start["trained_parameters"] == trained < start["parameters"] and "8.2k of them trained" in said.stdout
    for name, limits in (("whole", [6]), ("parts", [3, 6])):
        for steps in limits:
            run = small_run(
                text, chosen, f"train.max_steps={steps}", "schedule.warmup_steps=0", "schedule.decay_fraction=0"
            )
            loop.train(tmp_path / name, run, quiet=True)
    one, other = (tensors(tmp_path / name) for name in ("whole", "parts"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert {name for name in one if name.startswith("optimizer")} == {
        "optimizer.layers.1.mlp.experts.gate_up_proj.momentum_buffer"
    }
    with pytest.raises(ConfigError, match=r"holds another run: its trainable is \('layers"):
        loop.train(tmp_path / "parts", small_run(text), quiet=True)


def test_a_pattern_that_matches_nothing_is_said_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainable: 'expert\.\*' matches no parameter; near: .*experts"):
        loop.train(tmp_path / "run", small_run(tmp_path, "trainable=['expert.*']"), quiet=True)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="trainable"):
        small_run(tmp_path, "trainable=[]")


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    newest = RunDirectory(directory).newest_valid()
    assert newest is not None
    return {
        f"{part}.{name}": tensor
        for part in ("model", "optimizer")
        for name, tensor in load_tensors(newest[1] / f"{part}.safetensors").items()
    }
