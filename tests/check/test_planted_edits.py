"""Faults planted in edited routing and in layers that do something with every expert: the check must be red."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import manyhands.moe.layer
import manyhands.moe.router
import manyhands.moe.soft
import manyhands.runtime.reroute
from manyhands.check.decoding import small_models
from manyhands.check.edited import EditedCheck, editable
from manyhands.check.report import Row
from manyhands.check.routers import ROUTERS, RouterCheck
from manyhands.moe import Force, Mask, Replay, Swap
from manyhands.moe.unchosen import Outputs

MODELS = {name: config for name, config in small_models().items() if editable(config)}
NATIVE = next(name for name in MODELS if "Mixtral" in name)
AVERAGES = next(name for name in MODELS if "averages" in name)


def edited_rows(name: str) -> list[Row]:
    return [row for rows, _ in EditedCheck(name, MODELS[name], "plain", "float32", 0).rows() for row in rows]


def layer_rows(word: str, case: str = "random") -> list[Row]:
    (name,) = [name for name in ROUTERS if word in name]
    return [row for rows, _ in RouterCheck(name, case, 0).rows("eager", "float32") for row in rows]


def red(rows: list[Row]) -> set[str]:
    return {row.quantity for row in rows if not row.ok}


@pytest.mark.parametrize("name", [NATIVE, AVERAGES], ids=["program", "modules"])
@pytest.mark.parametrize("kind", [Mask, Swap, Force, Replay])
def test_an_edit_that_is_not_followed(name: str, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not red(edited_rows(name))
    for module in (manyhands.runtime.reroute, manyhands.moe.router):
        right = module.reroute

        def wrong(edit, ids_TK, scores_TE, weigh, right=right):
            if isinstance(edit, kind):
                return ids_TK, weigh(scores_TE, ids_TK), None
            return right(edit, ids_TK, scores_TE, weigh)

        monkeypatch.setattr(module, "reroute", wrong)
        if kind is Mask:
            monkeypatch.setattr(module, "masked", lambda *_: None)
    seen = {"decoding: expert choice", "decoding: router weights"}
    if kind is Mask:  # the masked expert's score shows it too where no token would have taken it
        seen |= {"decoding: router scores"}
    assert red(edited_rows(name)) & seen


def test_averages_that_stay_when_experts_are_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    right = manyhands.moe.layer.unchosen_weights
    monkeypatch.setattr(manyhands.moe.layer, "unchosen_weights", lambda routing, config, edit: right(routing, config))
    assert red(edited_rows(AVERAGES)) == {"decoding: states", "decoding: logits"}


def test_what_cannot_be_edited_is_left_out() -> None:
    left = {name for name, router in ROUTERS.items() if any(key.startswith(name) for key in MODELS)}
    assert left >= {name for name, r in ROUTERS.items() if r.select == "topk" and r.n_group > 1}
    assert all(ROUTERS[name].select == "topk" for name in left)


# ---- layers that do something with every expert ----


@pytest.mark.parametrize(
    ("fault", "quantities"),
    [("all alike", {"output"}), ("own directions", {"output", "router scores"}), ("padding", {"output"})],
)
def test_faults_of_soft_mixtures(fault: str, quantities: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    case = "padding" if fault == "padding" else "random"
    assert not red(layer_rows("Soft MoE", case))
    if fault == "all alike":  # every slot speaks alike to every token
        einsum = torch.einsum

        def mean(how: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return einsum(how, torch.full_like(a, 1.0 / a.shape[-1]) if how == "bsn,bnd->bsd" else a, b)

        monkeypatch.setattr(torch, "einsum", mean)
    elif fault == "own directions":  # of any length
        plain = SimpleNamespace(normalize=lambda x, dim: x if dim == 1 else F.normalize(x, dim=dim))
        monkeypatch.setattr(manyhands.moe.soft, "F", plain)
    else:
        monkeypatch.setattr(torch.Tensor, "masked_fill", lambda x, *_: x)
    assert red(layer_rows("Soft MoE", case)) >= quantities


def test_faults_of_averages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The chosen experts' averages too: counted twice."""
    assert not red(layer_rows("Default MoE"))
    everyone = lambda routing, config, edit: routing.scores * config.routed_scaling_factor  # noqa: E731
    monkeypatch.setattr(manyhands.moe.layer, "unchosen_weights", everyone)
    assert red(layer_rows("Default MoE")) >= {"output", "gradients"}


@pytest.mark.parametrize("fault", ["nothing", "everything"])
def test_faults_of_densemixer(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The output is right either way: only the router's gradient is not."""
    assert not red(layer_rows("DenseMixer"))
    if fault == "nothing":
        monkeypatch.setattr(manyhands.moe.layer, "router_gradient", lambda weights, x, outputs: torch.zeros_like(x))
    else:
        right = manyhands.moe.layer.router_gradient

        def doubled(weights: torch.Tensor, x: torch.Tensor, outputs: Outputs) -> torch.Tensor:
            return 2.0 * right(weights, x, outputs)

        monkeypatch.setattr(manyhands.moe.layer, "router_gradient", doubled)
    found = [row for row in layer_rows("DenseMixer") if not row.ok]
    assert {row.quantity for row in found} == {"gradients"}
    assert {row.situation.mode for row in found} == {"train"} and {row.failing for row in found} == {
        ("router.weight", "x")
    }


def test_shares_of_next_to_nothing() -> None:
    """A token whose scores add up to 8e-4: its gradient is as large as the inverse, and so is the rounding in it."""
    (name,) = [name for name in ROUTERS if "ReMoE" in name]
    rows = [row for found, _ in RouterCheck(name, "tied", 7).rows("eager", "float32") for row in found]
    assert not red(rows)
    limits = {row.quantity: row.limit for row in rows}
    assert limits["aux_loss/micro gradient"] > limits["z_loss gradient"] == limits["l1 gradient"] == 1e-4
