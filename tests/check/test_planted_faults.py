"""Faults planted in the real code. The check must see each of them and name where it is."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import manyhands.check.losses
import manyhands.check.parts
import manyhands.layers.rope
import manyhands.moe.balance
import manyhands.moe.router
import manyhands.moe.select
from manyhands.check import CheckReport, run_check
from manyhands.check.attentions import AttentionCheck
from manyhands.check.routers import RouterCheck
from manyhands.layers.norm import LayerNorm
from manyhands.models import Decoder
from manyhands.moe import Experts, LoadCounter, Router
from tests.check.configs import BALANCE, DEEPSEEK, MIXTRAL

CPU = torch.device("cpu")
LAYERS = (1, 2)  # DEEPSEEK's sparse layers, after shrinking


def _check(config=DEEPSEEK, **options) -> CheckReport:
    options = {"backends": ["eager"], "dtypes": ["float32"], "cases": ["random"]} | options
    return run_check(config, BALANCE, routers=False, decoding=False, **options)


def _failing(report: CheckReport) -> dict[str, set[str]]:
    """Quantity -> the names that failed in it, in any situation."""
    found: dict[str, set[str]] = {}
    for row in report.failures:
        found.setdefault(row.quantity, set()).update(row.failing)
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_router_detached(monkeypatch, dtype):
    weigh = manyhands.moe.router.weigh
    monkeypatch.setattr(manyhands.moe.router, "weigh", lambda s, ids, config: weigh(s.detach(), ids, config))
    report = _check(dtypes=[dtype])
    assert not report.ok
    failing = _failing(report)
    assert {f"layers.{n}.mlp.router.weight" for n in LAYERS} <= failing["gradients"]
    assert "logits" not in failing and "router weights" not in failing  # the forward pass is right


def test_softmax_twice(monkeypatch):
    twice = SimpleNamespace(linear=lambda x, w, b: F.linear(x, w, b).softmax(-1), softplus=F.softplus)
    monkeypatch.setattr(manyhands.moe.router, "F", twice)
    report = _check(MIXTRAL)
    assert not report.ok
    failing = _failing(report)
    assert failing["router scores"] == {"layers.0.mlp.router.scores", "layers.1.mlp.router.scores"}
    assert failing["router weights"] >= {"layers.0.mlp.router.weights", "layers.1.mlp.router.weights"}


def test_bias_in_the_weights(monkeypatch):
    forward = Router.forward

    def leaking(self, *args):
        routing = forward(self, *args)
        biased = routing.scores + self.e_score_correction_bias
        return replace(routing, weights=manyhands.moe.router.weigh(biased, routing.expert_ids, self.config))

    monkeypatch.setattr(Router, "forward", leaking)
    report = _check()
    assert not report.ok
    failing = _failing(report)
    assert failing["router weights"] == {f"layers.{n}.mlp.router.weights" for n in LAYERS}
    assert "layers.1.mlp.router.scores" not in failing["router scores"]  # what comes before the fault is right
    assert "layers.1.mlp.router.expert_ids" not in failing["expert choice"]


def test_zero_for_masked_groups(monkeypatch):
    limit = manyhands.moe.router.limit_to_groups

    def zero(choice, config):
        limited = limit(choice, config)
        return torch.where(limited.isinf(), 0.0, limited)

    monkeypatch.setattr(manyhands.moe.router, "limit_to_groups", zero)
    report = _check()
    assert not report.ok
    assert _failing(report)["expert choice"] == {f"layers.{n}.mlp.router.expert_ids" for n in LAYERS}


def test_balance_over_padding(monkeypatch):
    def over_all(routing, ranks):
        return manyhands.moe.balance._normalised(routing.scores).mean(0)

    monkeypatch.setattr(manyhands.moe.balance, "mean_probability", over_all)
    report = _check(cases=["random", "padding"])
    assert not report.ok
    assert {row.situation.case for row in report.failures} == {"padding"}
    failing = _failing(report)
    assert failing["aux_loss/micro value"] == {f"layers.{n}.aux_loss/micro" for n in LAYERS}
    assert failing["aux_loss/micro gradient"] == {f"layers.{n}.mlp.router.weight" for n in LAYERS}


def test_counts_doubled_by_recomputation(monkeypatch):
    live: list[LoadCounter] = []
    routers: list[Router] = []
    empty, add, forward = LoadCounter.empty, LoadCounter.add, Router.forward

    def registered(*args):
        live.append(empty(*args))
        return live[-1]

    def counting(self, *args):
        """A router that counts in its forward, which recomputation calls once more in the backward pass."""
        routing = forward(self, *args)
        if self not in routers:
            routers.append(self)
        if live:
            add(live[routers.index(self) - len(LAYERS)], routing)
        return routing

    monkeypatch.setattr(LoadCounter, "empty", registered)
    monkeypatch.setattr(LoadCounter, "add", lambda self, routing: None)
    monkeypatch.setattr(Router, "forward", counting)
    report = _check()
    assert not report.ok
    assert {row.situation.mode for row in report.failures} == {"recompute"}
    assert _failing(report)["expert counts"] == {f"layers.{n}.mlp.expert_counts" for n in LAYERS}
    assert {row.ratio for row in report.failures if row.quantity == "expert counts"} == {2.0}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_applied_twice(monkeypatch, dtype):
    forward = Experts.forward

    def squared(self, x, routing, implementation=None):
        return forward(self, x, replace(routing, weights=routing.weights**2), implementation)

    monkeypatch.setattr(Experts, "forward", squared)
    report = _check(dtypes=[dtype])
    assert not report.ok
    failing = _failing(report)
    assert "logits" in failing
    assert any(name.startswith("layers.1.mlp.experts.down_proj[") for name in failing["gradients"])
    assert "layers.1.mlp.router.weights" not in failing.get("router weights", set())  # they are right; their use is not


@pytest.mark.parametrize("backend", ["eager", "grouped_mm"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_experts_gradient_dropped(monkeypatch, backend, dtype):
    weights = Experts.weights

    def without(self):
        w = weights(self)
        return w._replace(down=torch.cat((w.down[:3], w.down[3:4].detach(), w.down[4:])))

    monkeypatch.setattr(Experts, "weights", without)
    report = _check(backends=[backend], dtypes=[dtype])
    assert not report.ok
    assert _failing(report)["gradients"] == {f"layers.{n}.mlp.experts.down_proj[3]" for n in LAYERS}


def test_a_loss_that_the_oracle_lacks_is_not_silent(monkeypatch):
    terms = manyhands.check.losses.balance_terms

    def more(routing, config, *rest):
        return terms(routing, config, *rest) | {"novel": routing.scores.square().mean()}

    monkeypatch.setattr(manyhands.check.losses, "balance_terms", more)
    report = _check(MIXTRAL)
    assert _failing(report) == {"novel value": {"novel"}}


def test_a_loss_that_the_model_lacks_is_not_silent(monkeypatch):
    terms = manyhands.check.losses.balance_terms
    without = {"variance"}

    def fewer(*arguments):
        return {name: value for name, value in terms(*arguments).items() if name not in without}

    monkeypatch.setattr(manyhands.check.losses, "balance_terms", fewer)
    assert _failing(_check(MIXTRAL)) == {"variance value": {"variance"}}


def test_a_coefficient_that_nobody_computes_is_not_silent(monkeypatch):
    monkeypatch.setattr(manyhands.check.losses, "COEFFICIENTS", [*manyhands.check.losses.COEFFICIENTS, "novel_coef"])
    assert _failing(_check(MIXTRAL)) == {"novel value": {"novel"}}


@pytest.mark.parametrize(
    ("name", "router", "fault"),
    [
        ("manyhands.moe.router.positive", "ReLU (ReMoE)", "nearly positive"),
        ("manyhands.moe.assign.sinkhorn_offsets", "Sinkhorn", "no offsets"),
        ("manyhands.moe.assign.assign", "balanced assignment (BASE)", "in turn"),
        ("manyhands.moe.sparsemixer.HEUN", "SparseMixer (Phi-3.5-MoE)", "a half"),
    ],
)
def test_faults_of_other_routers(monkeypatch, name, router, fault):
    faults = {
        "nearly positive": lambda scores_TE: manyhands.moe.select.positive(scores_TE - 0.05),
        "no offsets": lambda logits_TE: torch.zeros(logits_TE.shape[1]),
        "in turn": lambda values_TE, room: torch.arange(len(values_TE)).numpy() % values_TE.shape[1],
        "a half": 0.5,
    }
    monkeypatch.setattr(name, faults[fault])
    rows = [row for rows, _ in RouterCheck(router, "random", 0).rows("eager", "float32") for row in rows]
    assert {row.quantity for row in rows if not row.ok} & {"expert choice", "router weights"}


@pytest.mark.parametrize(
    ("fault", "seen"),
    [("the other set", "attention"), ("no mean", "layer norm"), ("no bias on the head", "logits")],
)
def test_faults_of_phi(monkeypatch, fault, seen):
    if fault == "the other set":
        real = manyhands.layers.rope._frequencies
        monkeypatch.setattr(manyhands.layers.rope, "_kept", lambda c, dim, long: real(c, dim, CPU, not long))
        rows = list(AttentionCheck("LongRoPE, short (Phi-3.5-MoE)", 0).rows("float32"))
    elif fault == "no mean":
        monkeypatch.setattr(LayerNorm, "forward", lambda norm, x: F.rms_norm(x, x.shape[-1:], norm.weight) + norm.bias)
        rows = list(manyhands.check.parts._plain(0, "float32"))
    else:
        monkeypatch.setattr(Decoder, "head", lambda model, x: F.linear(x, model.head_weight.to(x.dtype)))
        rows = _check(
            MIXTRAL.model_copy(update={"norm": "layer_norm", "lm_head_bias": True, "tie_word_embeddings": False})
        ).failures
    assert seen in {row.quantity for row in rows if not row.ok}
