"""Experts put into those that stay: aligned channels, shares, who into whom."""

import itertools

import numpy as np
import pytest
import torch

from manyhands.checkpoint.model import load_model
from manyhands.checkpoint.source import open_source
from manyhands.kernels import ExpertWeights
from manyhands.moe import Routing
from manyhands.moe.assign import assign
from manyhands.quantize.receipt import Sample
from manyhands.tune.align import aligned, channels, matching
from manyhands.tune.importance import Seen
from manyhands.tune.keep import Member, reordered, shrunk
from manyhands.tune.merge import Likeness, likeness, merged
from manyhands.tune.prune import Pruning, prune

from .models import mixture, spoken, written

IDS = torch.randint(0, 270, (3, 20), generator=torch.Generator().manual_seed(1))


def drawn(experts: int, width: int, hidden: int, bias: bool = False, seed: int = 0, activation="swiglu"):
    draw = torch.Generator().manual_seed(seed)
    rows = 2 * width if activation != "gelu" else width
    up, down = torch.randn(experts, rows, hidden, generator=draw), torch.randn(experts, hidden, width, generator=draw)
    biases = (
        (torch.randn(experts, rows, generator=draw), torch.randn(experts, hidden, generator=draw))
        if bias
        else (None, None)
    )
    return ExpertWeights(up, down, *biases, activation)


@pytest.mark.parametrize(("bias", "activation"), [(False, "swiglu"), (True, "swiglu"), (True, "gelu")])
def test_no_order_of_channels_is_better(bias, activation):
    """Every permutation of six channels looked at."""
    weights = drawn(2, 6, 5, bias, activation=activation)
    order = aligned(weights, 0, 1)
    a, b = channels(weights, 0), channels(weights, 1)
    assert sorted(order.tolist()) == list(range(6))
    most = max(float((a * b[list(p)]).sum()) for p in itertools.permutations(range(6)))
    assert float((a * b[order]).sum()) == pytest.approx(most, rel=1e-12)


@pytest.mark.parametrize("kind", ["apart", "alike", "ties", "constant"])
@pytest.mark.parametrize("size", [1, 2, 3, 30, 90])
def test_the_matching_is_the_best_there_is(size, kind):
    """Against another algorithm, which shares tokens out."""
    rng = np.random.default_rng(size)
    values = rng.standard_normal((size, size))
    if kind == "alike":
        values[np.arange(size), rng.permutation(size)] += 3.0
    elif kind != "apart":
        values = rng.integers(0, 3 if kind == "ties" else 1, (size, size)).astype(np.float64)
    rows, found = np.arange(size), matching(values)
    assert sorted(found.tolist()) == list(range(size))
    assert values[rows, found].sum() == pytest.approx(values[rows, assign(values, 1)].sum(), abs=1e-9)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_a_shuffled_copy_is_found_and_changes_nothing(activation):
    F = 40
    weights = drawn(2, F, 12, True, activation=activation)
    shuffle = torch.randperm(F, generator=torch.Generator().manual_seed(3))
    up, up_bias = ("gate_up_proj", "gate_up_proj_bias") if activation == "swiglu" else ("up_proj", "up_proj_bias")
    assert weights.up_bias is not None and weights.down_bias is not None
    tensors = {up: weights.up, up_bias: weights.up_bias, "down_proj": weights.down, "down_proj_bias": weights.down_bias}
    for name, tensor in tensors.items():
        tensor[1] = reordered(name, tensor[0], shuffle)
    order = aligned(weights, 0, 1)
    assert torch.equal(shuffle[order], torch.arange(F))
    group = (Member(0, 0.25), Member(1, 0.75, order))
    for name, tensor in tensors.items():
        torch.testing.assert_close(
            shrunk(f"mlp.experts.{name}", [group], tensor.__getitem__)[0], tensor[0], rtol=0, atol=1e-6
        )
    plain = shrunk("mlp.experts.down_proj", [(Member(0, 0.5), Member(1, 0.5))], weights.down.__getitem__)[0]
    assert float((plain - weights.down[0]).abs().max()) > 0.1, "without the order it would not be itself"


def _seen(tokens: list[float], activation: list[float]) -> Seen:
    t = torch.tensor(tokens, dtype=torch.float64)
    return Seen(t, t.clone(), torch.tensor(activation, dtype=torch.float64) * t)


def test_shares_and_who_goes_where():
    weights = drawn(4, 3, 4)
    logits = torch.eye(4, dtype=torch.float64)
    logits[0, 2] = logits[2, 0] = 0.9
    logits[1, 3] = logits[3, 1] = 0.5
    seen, alike = _seen([6, 2, 2, 0], [1, 2, 3, 1]), Likeness(logits, torch.ones(4, 4, dtype=torch.float64))
    by_logits = merged("msmoe", [0, 1], seen.tokens, seen, alike, 1, weights)
    assert [[m.expert for m in group] for group in by_logits] == [[0, 2], [1]], "nobody chose expert 3"
    assert [m.share for m in by_logits[0]] == [0.75, 0.25]
    by_worth = merged("ream", [0, 1], seen.score("reap"), seen, alike, 1, weights)
    assert [[m.expert for m in group] for group in by_worth] == [[0], [1, 2]], "expert 1 is worth more and takes all"
    assert [m.share for m in by_worth[1]] == [0.4, 0.6]
    grouped = merged("msmoe", [0, 2], seen.tokens, seen, alike, 2, weights)
    assert [[m.expert for m in group] for group in grouped] == [[0, 1], [2]], "within the router's groups"


def test_no_expert_is_lost_beyond_sixteen():
    E = 40
    weights = drawn(E, 2, 2)
    ones = torch.ones(E, E, dtype=torch.float64)
    seen = _seen([1.0] * E, [1.0] * E)
    groups = merged("ream", [0, 1], seen.score("reap"), seen, Likeness(ones, ones), 1, weights)
    assert sorted(m.expert for group in groups for m in group) == list(range(E))
    assert sorted(len(group) for group in groups) == [17, 23]


def test_likeness_of_outputs_is_that_of_gated_outputs():
    layer = mixture().sparse_layers()[0]
    x = torch.randn(30, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        _, routing = layer(x)
        alike = likeness(x, routing, layer.experts)
        said = torch.zeros(8, 30, 16, dtype=torch.float64)
        for e in range(8):
            up = x @ layer.experts.gate_up_proj[e].T
            y = (torch.nn.functional.silu(up[:, :8]) * up[:, 8:]) @ layer.experts.down_proj[e].T
            said[e] = y * routing.scores[:, e, None]
        flat = torch.nn.functional.normalize(said.flatten(1), dim=1)
    torch.testing.assert_close(alike.outputs, flat @ flat.T, rtol=0, atol=1e-5)
    columns = torch.nn.functional.normalize(routing.logits.double(), dim=0)
    torch.testing.assert_close(alike.logits, columns.T @ columns, rtol=0, atol=1e-9)
    assert isinstance(routing, Routing)


def test_twins_are_merged_into_themselves():
    """Experts 4 to 7 are those from 0 to 3, their channels shuffled, with nearly the same rows of the router."""
    layer = mixture().sparse_layers()[0]
    with torch.no_grad():
        for e in range(4):
            order = torch.randperm(8, generator=torch.Generator().manual_seed(e))
            for name in ("gate_up_proj", "down_proj"):
                tensor = getattr(layer.experts, name)
                tensor[e + 4] = reordered(name, tensor[e], order)
            layer.router.weight[e + 4] = layer.router.weight[e] * 1.001
        x = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
        _, routing = layer(x, keep_outputs=True)
        seen = Seen.nothing(8)
        seen.add(routing)
        alike, weights = likeness(x, routing, layer.experts), layer.experts.weights()
        groups = merged("msmoe", range(4), seen.tokens, seen, alike, 1, weights)
        assert [{m.expert for m in group} for group in groups] == [{e, e + 4} for e in range(4)]
        for name, tensor in (("gate_up_proj", weights.up), ("down_proj", weights.down)):
            found = shrunk(f"mlp.experts.{name}", groups, tensor.__getitem__)
            torch.testing.assert_close(found, tensor[:4], rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def talking(tmp_path_factory):
    """A mixture and text of its own."""
    model = mixture()
    folder = written(model, tmp_path_factory.mktemp("mixture") / "whole", "mixtral")
    return folder, Sample(spoken(model, 32, 24), "its own words", 16)


@pytest.mark.parametrize("merge", ["msmoe", "ream"])
def test_what_is_written_is_what_was_measured(merge, talking, tmp_path):
    folder, sample = talking
    asked = Pruning(4, "frequency" if merge == "msmoe" else "reap", merge, curve=True)
    receipt = prune(open_source(folder), tmp_path / "merged", asked, sample)
    model = load_model(tmp_path / "merged")
    joined = 0
    for found in receipt["pruned"]["layers"].values():
        for shares in found["merged"].values():
            assert sum(shares.values()) == pytest.approx(1.0, abs=1e-5)
            joined += len(shares) - 1
    assert joined == 8, "four experts of each of two layers were put into others"
    hows = {point["how"] for point in receipt["curve"]}
    assert hows == {"all", f"{asked.by}, merged by {merge}", asked.by, "random", f"{asked.by}, reversed"}
    assert {point["experts"] for point in receipt["curve"]} == {8, 6, 4, 2}
    same = next(p for p in receipt["curve"] if p["experts"] == 4 and "merged" in p["how"])
    assert receipt["measured"]["after"]["loss"] == pytest.approx(same["loss"], abs=1e-5)
    how = receipt["source_tensors"]["model.layers.0.block_sparse_moe.experts.0.w1.weight"]["how"]
    assert how == "experts kept, others put into them"

    from transformers import AutoModelForCausalLM

    other = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(other(IDS).logits, model(IDS).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("family", "router"), [("gpt_oss", {}), ("deepseek_v3", {"n_group": 2, "topk_group": 1})])
def test_stacks_biases_and_groups_are_merged_too(family, router, tmp_path):
    model = mixture(family, **router)
    folder = written(model, tmp_path / "whole", family)
    sample = Sample(spoken(model, 8, 16), "its own words", 6)
    receipt = prune(open_source(folder), tmp_path / "merged", Pruning(4, "reap", "ream"), sample)
    loss = receipt["measured"]["after"]["loss"]
    with torch.no_grad():
        out = load_model(tmp_path / "merged")(sample.measured[:, :-1], dtype=torch.float32).logits
    nats = torch.nn.functional.cross_entropy(out.flatten(0, 1), sample.measured[:, 1:].flatten())
    assert loss == pytest.approx(float(nats), abs=1e-5)
    if router:
        assert [e // 4 for e in receipt["pruned"]["layers"]["0"]["kept"]] == [0, 0, 1, 1]
        for found in receipt["pruned"]["layers"].values():
            assert all(int(e) // 4 == int(o) // 4 for e, of in found.get("merged", {}).items() for o in of)
