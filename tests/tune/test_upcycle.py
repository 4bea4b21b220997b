"""A dense model as a mixture: exact or refused, and what its router learns."""

import json

import pytest
import torch

from manyhands.checkpoint.convert import convert
from manyhands.checkpoint.find import open_checkpoint
from manyhands.checkpoint.gguf.export import export
from manyhands.checkpoint.model import load_model
from manyhands.checkpoint.source import open_source
from manyhands.errors import CheckFailed, ConfigError, UserError
from manyhands.moe.balance import load_balancing_loss
from manyhands.tune.copies import Upcycling, dropped_channels
from manyhands.tune.upcycle import upcycle

from ..small_runs import manyhands
from .models import dense, mixture, written

IDS = torch.randint(0, 280, (3, 20), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(directory):
    return load_model(directory)(IDS).logits


@torch.no_grad()
def theirs(directory):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()(IDS).logits


@pytest.mark.parametrize(
    ("family", "to", "fields", "asked"),
    [
        ("llama", "mixtral", {}, Upcycling(8, 2)),
        ("llama", "mixtral", {"tie_word_embeddings": True}, Upcycling(6, 4, granularity=2)),
        ("qwen3", "qwen3_moe", {"intermediate_size": 32}, Upcycling(16, 4, granularity=4)),
        ("qwen3", "qwen3_moe", {"tie_word_embeddings": True}, Upcycling(5, 5)),
        ("llama", "mixtral", {"intermediate_size": 36}, Upcycling(6, 3, granularity=3)),
    ],
)
def test_the_mixture_is_the_dense_model_in_transformers_too(family, to, fields, asked, tmp_path):
    written(dense(family, **fields), tmp_path / "dense", family)
    receipt = upcycle(open_source(tmp_path / "dense"), tmp_path / "sparse", asked)
    assert receipt["target"]["model_type"] == to and receipt["upcycled"]["exact"]
    before = logits(tmp_path / "dense")
    torch.testing.assert_close(logits(tmp_path / "sparse"), before, rtol=0, atol=1e-5)
    torch.testing.assert_close(theirs(tmp_path / "sparse"), theirs(tmp_path / "dense"), rtol=0, atol=1e-5)
    assert 0 < receipt["agreement"]["largest_logit_difference"] < 1e-5
    config = load_model(tmp_path / "sparse").config
    assert config.moe.router.num_experts == asked.num_experts and len(config.sparse_layers) == 3
    assert config.moe.moe_intermediate_size * asked.granularity == fields.get("intermediate_size", 24)
    rows = load_model(tmp_path / "sparse").layers[1].mlp.router.weight
    assert len(rows.unique(dim=0)) == asked.num_experts // asked.granularity


def test_what_became_of_every_tensor(tmp_path):
    written(dense(), tmp_path / "dense", "llama")
    receipt = upcycle(open_source(tmp_path / "dense"), tmp_path / "sparse", Upcycling(4, 2))
    assert json.loads((tmp_path / "sparse" / "receipt.json").read_text()) == receipt
    gate = receipt["source_tensors"]["model.layers.1.mlp.gate_proj.weight"]
    assert gate["how"] == "copied into experts"
    assert {f"model.layers.1.block_sparse_moe.experts.{e}.w1.weight" for e in range(4)} <= set(gate["became"])
    assert receipt["source_tensors"]["model.norm.weight"]["how"] == "moved, bit for bit"
    w2 = receipt["target_tensors"]["model.layers.1.block_sparse_moe.experts.3.w2.weight"]
    assert w2["from"] == ["model.layers.1.mlp.down_proj.weight"]
    assert receipt["target_tensors"]["model.layers.1.block_sparse_moe.gate.weight"]["from"] == []
    assert {fate["how"] for fate in receipt["source_tensors"].values()} == {"copied into experts", "moved, bit for bit"}


def test_a_multiple_that_bfloat16_has_not_is_refused(tmp_path):
    written(dense(), tmp_path / "dense", "llama", dtype=torch.bfloat16)
    source = open_source(tmp_path / "dense")
    with pytest.raises(CheckFailed, match="3 times a weight is not exact in bfloat16: give --dtype float32"):
        upcycle(source, tmp_path / "sparse", Upcycling(6, 3, granularity=3))
    assert not (tmp_path / "sparse").exists()
    upcycle(source, tmp_path / "sparse", Upcycling(6, 3, granularity=3), dtype=torch.float32)
    torch.testing.assert_close(
        load_model(tmp_path / "sparse")(IDS).logits,
        load_model(tmp_path / "dense", dtype=torch.float32)(IDS).logits,
        rtol=0,
        atol=1e-5,
    )


def test_a_fault_in_one_expert_is_seen(tmp_path, monkeypatch):
    from manyhands.tune import copies

    real = copies._down

    def faulty(out, *args, **how):
        real(out, *args, **how)
        out[3] *= 1.001

    monkeypatch.setattr(copies, "_down", faulty)
    written(dense(), tmp_path / "dense", "llama")
    with pytest.raises(CheckFailed, match="nothing was written"):
        upcycle(open_source(tmp_path / "dense"), tmp_path / "sparse", Upcycling(4, 2))
    assert not (tmp_path / "sparse").exists()


def test_dropping_changes_the_dropped_channels_alone(tmp_path):
    model = dense()
    written(model, tmp_path / "dense", "llama")
    source = open_source(tmp_path / "dense")
    asked = Upcycling(4, 2, granularity=2, drop=0.25, seed=7)
    receipt = upcycle(source, tmp_path / "sparse", asked)
    assert not receipt["upcycled"]["exact"] and receipt["agreement"]["largest_logit_difference"] > 1e-3
    sparse, F = load_model(tmp_path / "sparse"), 12
    chosen = []
    for e in range(4):
        dropped = dropped_channels(asked, 1, e, F)
        chosen.append(tuple(dropped))
        stays = [f for f in range(F) if f not in dropped]
        assert len(dropped) == 3
        up, down = sparse.layers[1].mlp.experts.gate_up_proj[e], sparse.layers[1].mlp.experts.down_proj[e]
        rows = slice(e % 2 * F, e % 2 * F + F)
        mlp = model.layers[1].mlp
        old = {"gate": mlp.gate_proj.weight[rows], "up": mlp.up_proj.weight[rows]}
        old["down"] = 2 * mlp.down_proj.weight[:, rows].T
        new = {"gate": up[:F], "up": up[F:], "down": down.T}
        for name in old:
            assert torch.equal(new[name][stays], old[name][stays])
            assert not (new[name][dropped] == old[name][dropped]).any()
    assert len(set(chosen)) > 1, "each expert drops channels of its own"
    again = upcycle(source, tmp_path / "again", asked)
    assert again["target_tensors"] == receipt["target_tensors"]
    none = upcycle(source, tmp_path / "none", Upcycling(4, 2, granularity=2, drop=0.0, seed=7))
    assert none["upcycled"]["exact"]


def test_what_is_dropped_starts_with_the_mean_and_deviation_of_what_it_replaces(tmp_path):
    model = dense(num_hidden_layers=1, hidden_size=64, intermediate_size=256)
    with torch.no_grad():
        model.layers[0].mlp.up_proj.weight.add_(0.5)
    written(model, tmp_path / "dense", "llama")
    upcycle(open_source(tmp_path / "dense"), tmp_path / "sparse", Upcycling(2, 2, drop=1.0))
    old = model.layers[0].mlp.up_proj.weight.detach()
    new = load_model(tmp_path / "sparse").layers[0].mlp.experts.gate_up_proj.detach()[:, 256:]
    for expert in new:  # 16,384 draws: the mean's error is 0.3 / 128
        assert abs(float(expert.mean() - old.mean())) < 6 * 0.3 / 128
        assert float(expert.std()) == pytest.approx(float(old.std()), rel=0.05)
    assert not torch.equal(new[0], new[1])


def test_noise_parts_the_copies(tmp_path):
    written(dense(), tmp_path / "dense", "llama")
    receipt = upcycle(open_source(tmp_path / "dense"), tmp_path / "sparse", Upcycling(4, 2, noise=0.01))
    assert not receipt["upcycled"]["exact"] and 1e-5 < receipt["agreement"]["largest_logit_difference"] < 1.0
    down = load_model(tmp_path / "sparse").layers[0].mlp.experts.down_proj
    assert len(down.unique(dim=0)) == 4


def _router_gradient(model, balance=0.0):
    model.zero_grad()
    out = model(IDS)
    nats = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    aux = sum(load_balancing_loss(routing) for routing in out.routings.values())
    (nats + balance * aux).backward()
    return torch.stack([layer.router.weight.grad.clone() for layer in model.sparse_layers().values()])


def test_the_router_has_no_gradient_until_experts_differ(tmp_path):
    """At step 0 only the balance loss moves it; after a step of the experts the loss does."""
    written(dense(), tmp_path / "dense", "llama")
    upcycle(open_source(tmp_path / "dense"), tmp_path / "sparse", Upcycling(4, 2))
    model = load_model(tmp_path / "sparse").train()
    task = _router_gradient(model)
    with_balance = _router_gradient(model, 0.01)
    experts = [p for n, p in model.named_parameters() if ".experts." in n]
    down = model.layers[0].mlp.experts.down_proj.grad
    assert float((down - down[:1]).abs().max()) > 1e-4, "each expert learns from its own tokens"
    assert float(task.abs().max()) < 1e-6 < 1e-5 < float(with_balance.abs().max())
    with torch.no_grad():
        for p in experts:
            p -= 0.1 * p.grad
    assert float(_router_gradient(model).abs().max()) > 1e3 * float(task.abs().max())


def test_from_gguf(tmp_path):
    """Rows of queries and keys are stored in another order there, and q8_0 is decoded."""
    model = dense(hidden_size=32, intermediate_size=64, attention={"num_attention_heads": 2, "head_dim": 16})
    written(model, tmp_path / "dense", "llama")
    for kind in ("f32", "q8_0"):
        file = tmp_path / f"{kind}.gguf"
        export(tmp_path / "dense", file, file_type=kind, with_vocabulary=False)
        receipt = upcycle(open_checkpoint(file), tmp_path / kind, Upcycling(4, 2), dtype=torch.float32)
        assert receipt["target"]["model_type"] == "mixtral"
        with torch.no_grad():
            before = load_model(file, dtype=torch.float32)(IDS).logits
        torch.testing.assert_close(logits(tmp_path / kind), before, rtol=0, atol=1e-5)


def test_what_is_refused(tmp_path):
    written(dense(), tmp_path / "dense", "llama")
    written(mixture(), tmp_path / "mixture", "mixtral")
    source = open_source(tmp_path / "dense")
    for asked, says in (
        (Upcycling(4, 1), "--top-k 1: .* the router never learns"),
        (Upcycling(4, 8), "--top-k 8 of --experts 4: a token cannot go to more"),
        (Upcycling(5, 2, granularity=2), "must be multiples of it"),
        (Upcycling(10, 5, granularity=5), "--granularity 5 does not divide the width 24"),
    ):
        with pytest.raises(UserError, match=says):
            upcycle(source, tmp_path / "sparse", asked)
    with pytest.raises(UserError, match="a mixture of 8 experts already"):
        upcycle(open_source(tmp_path / "mixture"), tmp_path / "sparse", Upcycling())
    with pytest.raises(ConfigError, match=r"norm_topk_prob|qk_norm"):
        upcycle(source, tmp_path / "sparse", Upcycling(), to="olmoe")
    assert not (tmp_path / "sparse").exists()


def test_from_the_command_line(tmp_path):
    written(dense(), tmp_path / "dense", "llama")
    done = manyhands("upcycle", "dense", "sparse", "--experts", "4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "llama -> mixtral: 4 experts, 2 per token" in done.stdout and "exact: on 96 random tokens" in done.stdout
    assert "gradient at step 0 is zero" in done.stdout
    assert (tmp_path / "sparse" / "tokenizer.json").is_file()
    again = manyhands("upcycle", "dense", "sparse", "--experts", "4", cwd=tmp_path)
    assert again.returncode == 2 and "exists and is not empty" in again.stderr
    changed = manyhands("upcycle", "dense", "sparse", "--drop", "0.5", "--overwrite", "--json", cwd=tmp_path)
    assert json.loads(changed.stdout)["upcycled"]["drop"] == 0.5
    wrong = manyhands("upcycle", "dense", "other", "--top-k", "9", cwd=tmp_path)
    assert wrong.returncode == 2 and len(wrong.stderr.splitlines()) == 1
    convert(tmp_path / "sparse", tmp_path / "converted")  # like any checkpoint
