"""The check of the mixtures of 1991 and 1994 is green on what is right and red on planted faults."""

import pytest
import torch

from manyhands.check.numbers import number_rows
from manyhands.models import expectation_maximisation, local_experts


@pytest.mark.parametrize("seed", [0, 1])
def test_green(seed: int) -> None:
    rows = list(number_rows(seed))
    assert all(row.ok for row in rows), [row.line() for row in rows if not row.ok]
    assert {"objective", "gradients", "log-likelihood", "weighted regressions"} <= {row.quantity for row in rows}


def failing(monkeypatch: pytest.MonkeyPatch, module: object, name: str, wrong: object) -> set[str]:
    monkeypatch.setattr(module, name, wrong)
    return {row.quantity for row in number_rows(0) if not row.ok}


def test_a_distance_that_is_not_halved_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = local_experts.distances
    wrong = failing(monkeypatch, local_experts, "distances", lambda o, d: 2 * right(o, d))
    assert {"objective", "gradients", "responsibilities", "one expert: half the squared error"} <= wrong


def test_a_gate_that_steps_down_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = expectation_maximisation.newton

    def wrong(gate_bI: torch.Tensor, share_Nb: torch.Tensor, x_NI: torch.Tensor) -> torch.Tensor:
        return -right(gate_bI, share_Nb, x_NI)

    assert failing(monkeypatch, expectation_maximisation, "newton", wrong) == {"epochs that lower the objective"}
