"""Mixtures with fewer experts: which stay, that the rest is untouched, and what the curve says."""

import json

import numpy as np
import pytest
import torch

from manyhands.checkpoint.model import load_model, save
from manyhands.checkpoint.source import open_source
from manyhands.config import PackedConfig, Packing
from manyhands.engine.recording import recorder_for
from manyhands.errors import CheckpointError, ConfigError, DataError, UserError
from manyhands.moe import Mask
from manyhands.quantize.quantize import quantize
from manyhands.quantize.receipt import Sample
from manyhands.text import Tokenizer
from manyhands.trace.recording import Phase, Trace
from manyhands.tune.importance import Seen, random_score, traced
from manyhands.tune.keep import best, fewer, parse_keep
from manyhands.tune.prune import Pruning, prune

from ..small_runs import manyhands
from .models import dense, mixture, spoken, written

IDS = torch.randint(0, 270, (3, 20), generator=torch.Generator().manual_seed(1))
SAMPLE = Sample(torch.randint(0, 270, (6, 33), generator=torch.Generator().manual_seed(2)), "words", 4)
GROUPED = {"n_group": 2, "topk_group": 1}


@torch.no_grad()
def logits(model, edit=None):
    return model(IDS, edit=edit, dtype=torch.float32).logits


@pytest.mark.parametrize(
    ("family", "router"),
    [("mixtral", {}), ("qwen3_moe", {}), ("olmoe", {}), ("deepseek_v3", GROUPED), ("gpt_oss", {})],
)
def test_a_pruned_model_is_the_whole_one_with_the_others_off(family, router, tmp_path):
    """One path slices files, the other gives the others' logits -inf; and transformers agrees."""
    whole = mixture(family, **router)
    written(whole, tmp_path / "whole", family)
    receipt = prune(open_source(tmp_path / "whole"), tmp_path / "pruned", Pruning(4), SAMPLE)
    pruned = load_model(tmp_path / "pruned", dtype=torch.float32)
    kept = {int(layer): found["kept"] for layer, found in receipt["pruned"]["layers"].items()}
    assert set(kept) == {0, 1} and all(len(experts) == 4 for experts in kept.values())
    if router:
        assert [e // 4 for e in kept[0]] == [0, 0, 1, 1], "as many of each group"
    off = {layer: Mask(tuple(set(range(8)) - set(experts))) for layer, experts in kept.items()}
    torch.testing.assert_close(logits(pruned), logits(load_model(tmp_path / "whole"), off), rtol=0, atol=1e-5)
    assert pruned.config.moe.router.num_experts == 4

    from transformers import AutoModelForCausalLM

    other = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(other(IDS).logits, logits(pruned), rtol=0, atol=1e-5)


def test_experts_stored_one_by_one_are_moved_bit_for_bit(tmp_path):
    written(mixture(), tmp_path / "whole", "mixtral")
    receipt = prune(open_source(tmp_path / "whole"), tmp_path / "pruned", Pruning(3), SAMPLE)
    assert json.loads((tmp_path / "pruned" / "receipt.json").read_text()) == receipt
    name = "model.layers.1.block_sparse_moe.experts.{}.w2.weight"
    kept = receipt["pruned"]["layers"]["1"]["kept"]
    for n, e in enumerate(kept):
        was, now = receipt["source_tensors"][name.format(e)], receipt["target_tensors"][name.format(n)]
        assert (
            was["sha256"] == now["sha256"] and was["became"] == [name.format(n)] and was["how"] == "moved, bit for bit"
        )
        assert now["from"] == [name.format(e)]
    for e in set(range(8)) - set(kept):
        assert receipt["source_tensors"][name.format(e)]["became"] == []
        assert receipt["source_tensors"][name.format(e)]["how"] == "left out, as asked"
    gate = "model.layers.1.block_sparse_moe.gate.weight"
    assert receipt["source_tensors"][gate]["how"] == "experts kept" and receipt["target_tensors"][gate]["from"] == [
        gate
    ]


def test_own_format(tmp_path):
    save(mixture(), tmp_path / "whole", family="manyhands")
    receipt = prune(open_source(tmp_path / "whole"), tmp_path / "pruned", Pruning(4), SAMPLE)
    assert receipt["target"]["model_type"] == "manyhands"
    prune(open_source(tmp_path / "whole"), tmp_path / "mixtral", Pruning(4), SAMPLE, to="mixtral")
    a, b = (logits(load_model(tmp_path / name)) for name in ("pruned", "mixtral"))
    assert torch.equal(a, b)


def test_reap_is_the_mean_over_an_experts_tokens():
    """Against a loop over tokens and experts."""
    layer = mixture("olmoe").sparse_layers()[1]
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        _, routing = layer(x, keep_outputs=True)
        seen = Seen.nothing(8)
        seen.add(routing.rows(slice(0, 20)))
        seen.add(routing.rows(slice(20, 50)))
        tokens, gate, sums = np.zeros(8), np.zeros(8), np.zeros(8)
        probability = (x @ layer.router.weight.T).softmax(-1)
        for t in range(50):
            chosen = probability[t].topk(2).indices.tolist()
            for e in chosen:
                g = float(probability[t, e] / probability[t, chosen].sum())
                up = layer.experts.gate_up_proj[e] @ x[t]
                said = layer.experts.down_proj[e] @ (torch.nn.functional.silu(up[:8]) * up[8:])
                tokens[e], gate[e], sums[e] = tokens[e] + 1, gate[e] + g, sums[e] + g * float(said.norm())
    assert seen.score("frequency").tolist() == tokens.tolist()
    np.testing.assert_allclose(seen.score("gate"), gate, rtol=1e-5)
    np.testing.assert_allclose(seen.score("reap"), sums / np.maximum(tokens, 1), rtol=1e-5)


def test_what_a_capacity_left_out_is_not_counted():
    layer = mixture("mixtral", capacity_tokens=4).sparse_layers()[0]
    with torch.no_grad():
        _, routing = layer(torch.randn(30, 16, generator=torch.Generator().manual_seed(0)), keep_outputs=True)
    seen = Seen.nothing(8)
    seen.add(routing)
    assert not routing.kept.all() and seen.tokens.sum() == routing.kept.sum() and seen.tokens.max() <= 4


@pytest.fixture(scope="module")
def with_idle_experts(tmp_path_factory):
    """Experts 1, 4 and 6 of each layer say next to nothing; text drawn from the model itself."""
    model = mixture(experts=8)
    with torch.no_grad():
        for layer in model.sparse_layers().values():
            layer.experts.down_proj[[1, 4, 6]] *= 1e-4
    folder = written(model, tmp_path_factory.mktemp("idle") / "whole", "mixtral")
    return folder, Sample(spoken(model, 96, 32), "its own words", 48)


def test_idle_experts_go_first_and_the_order_is_importance_chance_reversed(with_idle_experts, tmp_path):
    folder, sample = with_idle_experts
    receipt = prune(open_source(folder), tmp_path / "pruned", Pruning(5, curve=True), sample)
    for found in receipt["pruned"]["layers"].values():
        assert found["kept"] == [0, 2, 3, 5, 7]
    curve = {(point["experts"], point["how"]): point for point in receipt["curve"]}
    assert {n for n, _ in curve} == {8, 6, 5, 4, 2}
    for n in (6, 5, 4):
        by, chance, wrong = (curve[n, how]["loss"] for how in ("reap", "random", "reap, reversed"))
        assert curve[8, "all"]["loss"] < by < chance < wrong
    assert len(curve[5, "random"]["draws"]) == 3
    measured = receipt["measured"]
    assert measured["tokens"] == 48 * 32 and measured["before"]["loss"] == curve[8, "all"]["loss"]
    assert measured["after"]["loss"] == pytest.approx(curve[5, "reap"]["loss"], abs=1e-6)
    assert curve[5, "reap"]["bits_per_byte"] > 0
    with torch.no_grad():  # the figure is the written model's, in one piece
        out = load_model(tmp_path / "pruned")(sample.measured[:, :-1]).logits
    nats = torch.nn.functional.cross_entropy(out.flatten(0, 1), sample.measured[:, 1:].flatten())
    assert measured["after"]["loss"] == pytest.approx(float(nats), abs=1e-5)


def test_scores_from_a_trace_are_those_of_the_run(tmp_path):
    folder = written(mixture(), tmp_path / "whole", "mixtral")
    model = load_model(folder)
    ids = SAMPLE.ids[:4, :-1]
    with torch.no_grad():
        hidden = model.hidden(ids)
    with recorder_for(model, Tokenizer.from_directory(folder), tmp_path / "trace", "test", None) as recorder:
        rows = {"sequence": np.arange(4).repeat(32), "position": np.tile(np.arange(32), 4)}
        recorder.add(hidden.routings, ids.flatten(), **rows, phase=Phase.SCORING, step=0)
    trace = Trace.open(tmp_path / "trace")
    for by in ("frequency", "gate"):
        live = prune(open_source(folder), tmp_path / f"live-{by}", Pruning(3, by), SAMPLE)
        told = prune(open_source(folder), tmp_path / f"told-{by}", Pruning(3, by), trace=trace)
        assert live["pruned"]["layers"] == told["pruned"]["layers"] and told["measured"] is None
        assert told["pruned"]["scored_on"]["tokens"] == ids.numel()
    counts = traced(trace, "frequency", [0, 1], 8)[1]
    assert counts.tolist() == hidden.routings[1].expert_counts().tolist()
    seen = Seen.nothing(8)
    with torch.no_grad():
        seen.add(model.hidden(ids, keep_outputs=True).routings[1])
    np.testing.assert_allclose(traced(trace, "gate", [0, 1], 8)[1], seen.gate, rtol=2e-3)  # recorded in float16
    with pytest.raises(UserError, match="needs what experts say, which no trace has"):
        prune(open_source(folder), tmp_path / "no", Pruning(3), trace=trace)
    written(mixture(experts=4), tmp_path / "other", "mixtral")
    with pytest.raises(DataError, match="a trace of another model"):
        prune(open_source(tmp_path / "other"), tmp_path / "no", Pruning(3, "frequency"), trace=trace)


def test_random_needs_no_text_and_follows_its_seed(tmp_path):
    folder = written(mixture(), tmp_path / "whole", "mixtral", tokenizer=False)
    kept = [
        prune(open_source(folder), tmp_path / str(n), Pruning(4, "random", seed=seed))["pruned"]["layers"]
        for n, seed in enumerate((0, 0, 1))
    ]
    assert kept[0] == kept[1] != kept[2]
    counts = sum(torch.zeros(8).index_fill_(0, torch.tensor(best(random_score(8, s, 0), 4)), 1) for s in range(400))
    assert counts.min() > 150 and counts.max() < 250  # 200 expected, deviation 10
    with pytest.raises(UserError, match="--by reap looks at experts on text, and there is none to run"):
        prune(open_source(folder), tmp_path / "no", Pruning(4))


@pytest.mark.parametrize(
    ("router", "says"),
    [
        ({"select": "hash", "num_experts_per_tok": 1}, "its table from tokens to experts is made for all of them"),
        ({"select": "expert_choice"}, "its experts choose their tokens"),
        ({"select": "positive", "score": "relu", "norm_topk_prob": False}, "does not pick the K best"),
        ({"select": "hierarchical", "n_group": 2}, "a level above the experts"),
    ],
)
def test_other_routers_are_refused(router, says, tmp_path):
    save(mixture(**router), tmp_path / "whole", family="manyhands")
    with pytest.raises(UserError, match=says):
        prune(open_source(tmp_path / "whole"), tmp_path / "pruned", Pruning(4, "random"))
    assert not (tmp_path / "pruned").exists()


def test_too_few(tmp_path):
    config = mixture("deepseek_v3", 12, n_group=4, topk_group=2, num_experts_per_tok=5).config
    with pytest.raises(UserError, match="--keep 6: the router has 4 groups, which keep equally many: a multiple of 4"):
        fewer(config, 6)
    with pytest.raises(UserError, match="goes to 5 experts of 2 of 4 groups; at least 12 must stay"):
        fewer(config, 8)
    assert fewer(config, 12).moe.router.num_experts == 12
    config = mixture("deepseek_v3", 12, n_group=4, topk_group=2).config
    assert fewer(config, 8).moe.router.num_experts == 8
    with pytest.raises(UserError, match="--keep 4: a group is scored by its two best experts; at least 8 must stay"):
        fewer(config, 4)  # transformers' router takes the two best of each
    with pytest.raises(UserError, match="goes to 2 experts; at least 2 must stay"):
        fewer(mixture().config, 1)
    with pytest.raises(UserError, match="it has no experts to take away"):
        fewer(dense().config, 4)


def test_what_keep_means():
    assert [parse_keep(text, 8) for text in ("6", "0.75", "75%", "1.0", "100%", " 1 ")] == [6, 6, 6, 8, 8, 1]
    assert parse_keep("1", 8) == 1
    for text in ("0", "9", "-1", "half", "0.3", "1/0", "nan", "", "120%"):
        with pytest.raises(UserError, match=r"--keep .*: "):
            parse_keep(text, 8)


def test_packed_weights_and_misfits_are_refused(tmp_path):
    folder = written(mixture("mixtral", experts=4), tmp_path / "whole", "mixtral")
    packed = PackedConfig(experts=Packing(format="int8"), linear=Packing(format="int8"))
    quantize(open_source(folder), tmp_path / "packed", packed, Sample(IDS, None))
    with pytest.raises(UserError, match="is packed: prune the original"):
        prune(open_source(tmp_path / "packed"), tmp_path / "pruned", Pruning(2), SAMPLE)
    with pytest.raises(ConfigError, match="does not fit olmoe"):
        prune(open_source(folder), tmp_path / "pruned", Pruning(2), SAMPLE, to="olmoe")
    with pytest.raises(UserError, match="token id 999; the model has vocab_size = 280"):
        prune(open_source(folder), tmp_path / "pruned", Pruning(2), Sample(torch.full((4, 9), 999), None, 2))
    assert not (tmp_path / "pruned").exists()


def test_what_the_model_does_not_compute_with_is_left_out_only_if_asked(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = written(mixture("deepseek_v3"), tmp_path / "whole", "deepseek_v3")
    tensors = load_file(folder / "model.safetensors") | {
        "model.layers.2.mlp.experts.7.up_proj.weight": torch.zeros(8, 16)
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    source = open_source(folder)
    with pytest.raises(CheckpointError, match=r"layers.2.mlp.experts.7.up_proj.weight. is an expert .* --drop-extras"):
        prune(source, tmp_path / "pruned", Pruning(4), SAMPLE)
    prune(source, tmp_path / "pruned", Pruning(4), SAMPLE, drop_extras=True)
    load_model(tmp_path / "pruned")


def test_from_the_command_line(tmp_path):
    written(mixture(), tmp_path / "whole", "mixtral")
    (tmp_path / "text.txt").write_text("the hands are many, and each of them does its part\n" * 60)
    done = manyhands(
        "prune", "whole", "half", "--keep", "50%", "--curve", "--data", "text.txt", "--max-batches", "1", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "4 of 8 experts stay in each of 2 layers, by reap" in done.stdout and "reap, reversed" in done.stdout
    assert "bits per byte" in done.stdout and "mean of 3 draws" in done.stdout
    for arguments, says in (
        (("--keep", "1"), "a token goes to 2 experts; at least 2 must stay"),
        (("--keep", "many"), "--keep many: a number of experts"),
        (("--keep", "4", "--no-measure"), "--by reap looks at experts on text"),
        (("--keep", "4", "--no-measure", "--curve"), "--curve needs a run"),
        (("--keep", "4", "--trace", "x", "--data", "text.txt"), "give one"),
        (("--keep", "4", "--trace", "nowhere", "--by", "gate"), "nowhere"),
    ):
        wrong = manyhands("prune", "whole", "other", *arguments, cwd=tmp_path)
        assert wrong.returncode == 2 and says in wrong.stderr and len(wrong.stderr.splitlines()) == 1, wrong.stderr
    quiet = manyhands("prune", "whole", "any", "--keep", "4", "--by", "random", "--no-measure", "--json", cwd=tmp_path)
    assert json.loads(quiet.stdout)["measured"] is None
    assert not (tmp_path / "other").exists()
