"""Beside a busy process OpenMP's threads wait asleep; alone they spin as they always did. Bits never change."""

import ctypes
from collections.abc import Callable, Iterator

import pytest
import torch

from manyhands.kernels.native.library import available, library
from manyhands.layers.norm import RMSNorm

pytestmark = pytest.mark.skipif(not available(), reason="the native library was not built")
SECOND = 1_000_000_000


@pytest.fixture
def look() -> Iterator[Callable[[int, int], bool]]:
    """What a look makes of nanoseconds of waiting for a core and of running on one; calm again afterwards."""
    function = library().mh_contention
    function.argtypes, function.restype = [ctypes.c_int64, ctypes.c_int64], ctypes.c_int64

    def look(waited: int, ran: int) -> bool:
        return bool(function(waited, ran))

    yield look
    for _ in range(5):
        look(0, SECOND)


def test_waiting_for_a_core_brings_it_and_calm_ends_it(look: Callable[[int, int], bool]) -> None:
    if not look(SECOND // 5, SECOND):
        pytest.skip("this PyTorch does not run on GNU's OpenMP")
    assert [look(0, SECOND) for _ in range(5)] == [True, True, True, True, False]


def test_a_little_waiting_is_ordinary(look: Callable[[int, int], bool]) -> None:
    assert not look(SECOND // 100, SECOND)


def test_too_short_a_time_decides_nothing(look: Callable[[int, int], bool]) -> None:
    assert not look(4_000_000, 1_000_000)


def test_it_stays_while_there_is_some_waiting(look: Callable[[int, int], bool]) -> None:
    if not look(SECOND, SECOND):
        pytest.skip("this PyTorch does not run on GNU's OpenMP")
    for _ in range(4):
        look(0, SECOND)
    assert look(SECOND // 50, SECOND)
    assert [look(0, SECOND) for _ in range(5)][-2:] == [True, False]


def test_the_bits_are_the_same(look: Callable[[int, int], bool]) -> None:
    x, norm = torch.randn(500, 256), RMSNorm(256, 1e-6)
    torch.nn.init.ones_(norm.weight)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        alone = norm(x) @ x.T
        look(SECOND, SECOND)
        assert torch.equal(norm(x) @ x.T, alone)
    finally:
        torch.set_num_threads(threads)
