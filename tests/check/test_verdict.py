"""What rounding excuses, and what it does not."""

import torch

from manyhands.check.oracle_dense import best
from manyhands.check.verdict import Slack, judge_choice, one_hot


def _judge(scores: list[float], ids: list[int], slack: float):
    choice = torch.tensor([scores], dtype=torch.float64)

    def select(values):
        return one_hot(best(values, len(ids)), len(scores))

    return judge_choice(select(choice), choice, torch.tensor([ids]), select, Slack(torch.tensor([slack])))


def test_agreement():
    verdict = _judge([0.1, 0.9, 0.5], [1, 2], 0.0)
    assert (verdict.flips, verdict.wrong) == (0, 0)


def test_a_near_tie_may_flip_and_is_adopted():
    verdict = _judge([0.1, 0.9, 0.5, 0.5001], [1, 2], 1e-3)
    assert (verdict.flips, verdict.wrong) == (1, 0)
    assert verdict.chosen.tolist() == [[False, True, True, False]]


def test_a_wide_margin_may_not():
    verdict = _judge([0.1, 0.9, 0.5, 0.6], [1, 2], 1e-3)
    assert (verdict.flips, verdict.wrong) == (0, 1)
    assert verdict.chosen.tolist() == [[False, True, False, True]]  # the oracle goes on with its own


def test_the_margin_is_twice_the_slack_on_either_side():
    assert _judge([0.1, 0.9, 0.5, 0.5039], [1, 2], 1e-3).flips == 1
    assert _judge([0.1, 0.9, 0.5, 0.5041], [1, 2], 1e-3).wrong == 1


def test_an_exact_tie_goes_to_the_lower_index_whatever_the_slack():
    assert _judge([0.5, 0.9, 0.5], [1, 2], 1e-3).wrong == 1
    assert _judge([0.5, 0.9, 0.5], [1, 0], 1e-3).wrong == 0


def test_rounding_may_make_values_equal():
    """Classes a = (0, 2) and b = (1, 3), nearly tied: if they round to one value, the lowest two are right."""
    assert _judge([0.5, 0.50001, 0.5, 0.50001], [0, 1], 1e-3).wrong == 0


def test_order_and_form():
    assert _judge([0.1, 0.9, 0.5], [2, 1], 1e-3).wrong == 1  # best first
    assert _judge([0.1, 0.9, 0.5], [1, 1], 1e-3).wrong == 1  # twice the same
    assert _judge([0.1, 0.9, 0.5], [1, 7], 1e-3).wrong == 1  # no such expert
