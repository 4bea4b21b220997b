"""Accumulation, recomputation and padding (§17.4–6): eight micro-batches are one batch, recomputing counts nothing."""

import pytest
import torch

from manyhands.config import BalanceConfig
from manyhands.layers.cross_entropy import linear_cross_entropy
from manyhands.moe import LoadCounter, balance_objective
from manyhands.moe.balance import update_bias

from .tiny_models import gradients, ids, tiny

V3 = {"score": "sigmoid", "bias": True, "n_group": 2, "topk_group": 1}
ALL_TERMS = BalanceConfig(
    aux_loss_coef=0.5, z_loss_coef=0.1, sequence_loss_coef=0.2, orthogonality_coef=0.01, variance_coef=0.3,
    importance_coef=0.1,
)  # fmt: skip


def run(model, x, mask=None, *, config=ALL_TERMS, counts=None, recompute=False, weight=1.0):
    """Forward and backward of task + balance. Returns total loss, the terms, the routings."""
    hidden = model.hidden(x, mask, recompute=recompute, keep_outputs=bool(config.orthogonality_coef))
    real = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.bool()
    targets, wanted = x.roll(-1, 1), real & real.roll(-1, 1)
    wanted[:, -1] = False
    task = linear_cross_entropy(hidden.states.flatten(0, 1), model.head_weight, targets.flatten(), wanted.flatten())
    extra, terms = balance_objective(hidden.routings, config, x.shape[0], counts)
    (weight * (task + extra)).backward()
    return (task + extra).detach(), terms, hidden.routings


def count(routings) -> dict[int, torch.Tensor]:
    return {layer: r.expert_counts() for layer, r in routings.items()}


def assert_same_gradients(one: dict, two: dict, tol: float = 1e-5) -> None:
    assert one.keys() == two.keys()
    for name in one:
        error = (one[name] - two[name]).abs().max()
        assert error <= tol * max(1.0, one[name].abs().max().item()), f"{name}: {error}"


@pytest.mark.parametrize("router", [{}, V3], ids=["mixtral", "v3"])
def test_eight_micro_batches_are_one_batch(router: dict) -> None:
    """Task gradients, counts, bias; the global-scope loss with the counts fixed beforehand."""
    config = BalanceConfig(aux_loss_coef=0.5, aux_scope="global", z_loss_coef=0.1)
    whole, parts, x = tiny(router=router), tiny(router=router), ids(B=8)
    with torch.no_grad():
        counts = count(whole.hidden(x).routings)
    loss, _, routings = run(whole, x, config=config, counts=counts)
    counters = {layer: LoadCounter.empty(6) for layer in routings}
    total = torch.zeros(())
    for row in x.split(1):
        part, _, pieces = run(parts, row, config=config, counts=counts, weight=1 / 8)
        total += part / 8
        for layer, routing in pieces.items():
            counters[layer].add(routing)
    assert all(torch.equal(counters[layer].counts, counts[layer]) for layer in counts)
    torch.testing.assert_close(total, loss, rtol=1e-5, atol=1e-5)
    assert_same_gradients(gradients(whole), gradients(parts))
    if router:
        for model, step in ((whole, counts), (parts, {n: c.counts for n, c in counters.items()})):
            for layer, c in step.items():
                update_bias(model.layers[layer].mlp.router.e_score_correction_bias, c, 1e-3)
        one, two = whole.state_dict(), parts.state_dict()
        biases = [name for name in one if "correction" in name]
        assert len(biases) == 2
        assert all(torch.equal(one[n], two[n]) and torch.count_nonzero(one[n]) for n in biases)


def test_micro_scope_differs_by_design() -> None:
    micro = BalanceConfig(aux_loss_coef=0.5, aux_scope="micro")
    model, x = tiny(), ids(B=8)
    whole = run(model, x, config=micro)[1]["aux_loss"]
    parts = torch.stack([run(model, row, config=micro)[1]["aux_loss"] for row in x.split(1)]).mean()
    assert (parts - whole).abs() > 1e-3


ROUTERS = {"mixtral": {}, "v3": V3, "random": {"noisy": True, "jitter": 0.2, "random_second": True}}


@pytest.mark.parametrize("router", list(ROUTERS.values()), ids=ROUTERS)
def test_recomputation_changes_nothing(router: dict) -> None:
    """Counts, every loss term, every gradient; random routers draw the same numbers again."""
    results = []
    for recompute in (False, True):
        model = tiny(router=router).train()
        torch.manual_seed(0)
        results.append((*run(model, ids(), recompute=recompute), gradients(model)))
    (loss1, terms1, routings1, grads1), (loss2, terms2, routings2, grads2) = results
    assert torch.equal(loss1, loss2) and all(torch.equal(terms1[n], terms2[n]) for n in terms1)
    assert all(torch.equal(a, b) for a, b in zip(count(routings1).values(), count(routings2).values(), strict=True))
    assert grads1.keys() == grads2.keys() and all(torch.equal(grads1[n], grads2[n]) for n in grads1)


def padded(x: torch.Tensor, left: int, right: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`x` with junk tokens around it and whole junk sequences below."""
    B, S = x.shape
    junk = ids(B + rows, left + S + right, seed=50)
    junk[:B, left : left + S] = x
    mask = torch.zeros_like(junk)
    mask[:B, left : left + S] = 1
    return junk, mask


@pytest.mark.parametrize("router", [{}, V3, {"capacity_factor": 1.0, "min_capacity": 1}], ids=["mixtral", "v3", "cap"])
@pytest.mark.parametrize("attention", ["gqa", "mla_window"])
@pytest.mark.parametrize(("left", "right", "rows"), [(0, 5, 0), (5, 0, 0), (3, 2, 1)])
def test_padding_changes_nothing(router: dict, attention: str, left: int, right: int, rows: int) -> None:
    """Every loss term, counts, outputs and gradients; padding left, right, and whole sequences of it."""
    one, two, x = tiny(attention, router=router), tiny(attention, router=router), ids()
    loss, terms, routings = run(one, x)
    y, mask = padded(x, left, right, rows)
    loss2, terms2, routings2 = run(two, y, mask)
    torch.testing.assert_close(loss2, loss, rtol=1e-5, atol=1e-5)
    for name in terms:
        torch.testing.assert_close(terms2[name], terms[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    for layer, routing in routings.items():
        real = mask.bool().flatten()
        assert torch.equal(routings2[layer].expert_counts(), routing.expert_counts())
        assert torch.equal(routings2[layer].expert_ids[real], routing.expert_ids)
        assert torch.equal(routings2[layer].kept[real], routing.kept)
    assert_same_gradients(gradients(one), gradients(two))


def test_evaluation_moves_no_bias_and_keeps_no_batch() -> None:
    model = tiny(router=V3).eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with torch.no_grad():
        model(ids())
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
