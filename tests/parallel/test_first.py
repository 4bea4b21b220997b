"""What rank 0 does for all, and who says why a job ends."""

import pytest
import torch
from torch import Tensor

from manyhands.errors import DataError, EndedElsewhere, RunLocked, exit_code_of
from manyhands.parallel.group import Group
from manyhands.parallel.ranks import Alone, Ranks, first, gathered
from tests.gloo import on_processes
from tests.thread_ranks import on_ranks


def _values(ranks: Ranks) -> tuple[object, list[bytes]]:
    did: list[int] = []

    def work() -> dict[str, list[float]]:
        did.append(ranks.rank)
        return {"reached": [0.1, 2.0]}

    heard = first(ranks, work)
    assert did == [0] * (ranks.rank == 0)
    return heard, gathered(ranks, bytes([ranks.rank]) * (2 * ranks.rank))


@pytest.mark.parametrize("size", [2, 4])
def test_rank_0_works_and_all_hear(size: int) -> None:
    assert (
        on_processes(size, _values) == [({"reached": [0.1, 2.0]}, [bytes([r]) * (2 * r) for r in range(size)])] * size
    )


def test_one_process_is_its_own_first() -> None:
    assert first(Alone(), lambda: (1, 2)) == (1, 2) and gathered(Alone(), b"ab") == [b"ab"]


@pytest.mark.parametrize("error", [RunLocked("in use by process 7"), ValueError("a bug"), KeyboardInterrupt()])
def test_what_fails_on_rank_0_ends_all_and_one_says_why(error: BaseException) -> None:
    def work(ranks: Ranks) -> tuple[str, int]:
        def fail() -> None:
            raise error

        with pytest.raises(BaseException) as raised:
            first(ranks, fail)
        return type(raised.value).__name__, exit_code_of(raised.value)

    code = exit_code_of(error)
    assert on_ranks(3, work) == [(type(error).__name__, code)] + [("EndedElsewhere", code)] * 2


def _failing(ranks: Group) -> int | None:
    if ranks.rank == 1:
        said = ranks.first_to_fail(DataError("x").exit_code)
        ranks.sum(_one())
        return said
    ranks.sum(_one())
    return ranks.first_to_fail(1)


def _one() -> Tensor:

    return torch.ones(1)


def test_the_first_to_fail_is_one() -> None:
    assert on_processes(3, _failing) == [2, None, 2]
    assert Alone().first_to_fail(1) is None


def test_an_error_that_was_said_elsewhere_has_its_code() -> None:
    assert exit_code_of(EndedElsewhere(143)) == 143
