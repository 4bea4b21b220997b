"""Per-sequence f·P and DeepSeek-V3's complementary loss (§7), against loops; the diversity terms of 2505.22323."""

from dataclasses import replace

import pytest
import torch

from manyhands.moe import balance

from .make_routing import make_layer, route_logits, routing_from, tokens


def one_sequence(scores: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    E, pairs = scores.shape[1], ids.numel()
    P = (scores / scores.sum(-1, keepdim=True)).mean(0)
    return sum(E * (ids == i).sum() / pairs * P[i] for i in range(E))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_v3_loss_against_a_loop(score: str) -> None:
    z, bias = tokens(24, 6), [0.5, -0.5, 0.0, 0.3, 0.0, -0.2]
    routing = route_logits(z, score=score, bias_values=bias)
    unbiased = routing.scores.topk(2).indices
    assert not torch.equal(unbiased.sort().values, routing.expert_ids.sort().values), "the bias must matter here"
    for loss, ids in (
        (balance.complementary_sequence_loss, unbiased),
        (balance.sequence_balancing_loss, routing.expert_ids),
    ):
        expected = sum(one_sequence(routing.scores[s], ids[s]) for s in (slice(0, 8), slice(8, 16), slice(16, 24))) / 3
        torch.testing.assert_close(loss(routing, 3), expected)


def test_one_sequence_is_the_micro_batch_loss() -> None:
    routing = route_logits(tokens(24, 6))
    torch.testing.assert_close(balance.sequence_balancing_loss(routing, 1), balance.load_balancing_loss(routing))


def test_sequence_scope_sees_what_batch_scope_does_not() -> None:
    """Two sequences, each loyal to one expert: balanced over the batch, at its worst within each sequence."""
    scores = [[0.99, 0.01]] * 4 + [[0.01, 0.99]] * 4
    routing = routing_from([[0]] * 4 + [[1]] * 4, scores)
    assert balance.load_balancing_loss(routing).item() == pytest.approx(1.0)
    assert balance.sequence_balancing_loss(routing, 2).item() == pytest.approx(1.98)


@pytest.mark.parametrize("loss", [balance.sequence_balancing_loss, balance.complementary_sequence_loss])
def test_padding_and_empty_sequences_count_nowhere(loss) -> None:
    z = tokens(8, 4).detach()
    expected = loss(route_logits(z.clone()), 2)
    padded = torch.cat((z[:4], 9 * tokens(2, 4), 9 * tokens(2, 4), z[4:], 9 * tokens(6, 4))).detach()
    mask = [True] * 4 + [False] * 2 + [False] * 2 + [True] * 4 + [False] * 6  # right, left, and an empty sequence
    torch.testing.assert_close(loss(route_logits(padded, mask=mask), 3), expected)


def test_reaches_every_experts_score() -> None:
    z = tokens(8, 6)
    balance.complementary_sequence_loss(route_logits(z, score="sigmoid"), 2).backward()
    assert (z.grad.abs() > 0).all()


def test_variance_loss_value_and_direction() -> None:
    """Scores (1,0) and (0,1): every deviation is ½, so −mean ¼."""
    assert balance.variance_loss(routing_from([[0], [1]], [[1.0, 0.0], [0.0, 1.0]])).item() == pytest.approx(-0.25)
    assert balance.variance_loss(routing_from([[0], [0]], [[0.7, 0.3], [0.7, 0.3]])).item() == pytest.approx(0.0)


def with_outputs(outputs, kept=None):
    T, K = len(outputs), len(outputs[0])
    routing = routing_from([list(range(K))] * T, torch.full((T, K), 1 / K))
    routing = replace(routing, expert_outputs=torch.tensor(outputs))
    return routing if kept is None else replace(routing, kept=torch.tensor(kept))


def test_orthogonality_values() -> None:
    """‖proj of o_j on o_k‖² = (o_j·o_k)²/‖o_k‖², summed over ordered pairs."""
    assert balance.orthogonality_loss(with_outputs([[[1.0, 0.0], [0.0, 5.0]]])).item() == 0.0
    same = balance.orthogonality_loss(with_outputs([[[2.0, 0.0], [2.0, 0.0]]]))
    assert same.item() == pytest.approx(8.0, rel=1e-5)
    skew = balance.orthogonality_loss(with_outputs([[[1.0, 0.0], [3.0, 4.0]]]))  # 9/25 + 9/1
    assert skew.item() == pytest.approx(9.36, rel=1e-5)


def test_orthogonality_skips_dropped_pairs_and_padding() -> None:
    outputs = [[[1.0, 0.0], [3.0, 4.0]], [[2.0, 0.0], [2.0, 0.0]]]
    dropped = with_outputs(outputs, kept=[[True, True], [True, False]])
    assert balance.orthogonality_loss(dropped).item() == pytest.approx(9.36 / 2, rel=1e-5)
    padded = replace(with_outputs(outputs), token_mask=torch.tensor([False, True]))
    assert balance.orthogonality_loss(padded).item() == pytest.approx(8.0, rel=1e-5)


def test_orthogonality_reaches_the_experts() -> None:
    layer = make_layer(router={"num_experts": 4})
    routing = layer(tokens(6, 8), keep_outputs=True)[1]
    assert routing.expert_outputs.shape == (6, 2, 8)
    balance.orthogonality_loss(routing).backward()
    assert layer.experts.down_proj.grad.abs().max() > 0


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_keeping_outputs_changes_no_output(implementation: str) -> None:
    router = {"num_experts": 4, "capacity_factor": 0.75, "min_capacity": 1}
    layer = make_layer(implementation=implementation, expert_bias=True, router=router)
    x = tokens(12, 8)
    plain, kept = layer(x)[0], layer(x, keep_outputs=True)
    torch.testing.assert_close(kept[0], plain)
    assert not kept[1].kept.all() and torch.count_nonzero(kept[1].expert_outputs[~kept[1].kept]) == 0
