"""Experts by a table, of which some are brought into memory during the call: the same bits, whatever was there."""

import threading
from collections.abc import Callable, Sequence
from ctypes import addressof, byref
from functools import cache
from itertools import chain, combinations

import pytest
import torch
from torch import Tensor

from manyhands.errors import ConfigError
from manyhands.kernels import ExpertWeights, native
from manyhands.kernels.moment import exactly
from manyhands.kernels.native import fetch, library, views
from manyhands.kernels.native.packed import packed_experts
from manyhands.kernels.native.structs import CGradients, CStep
from manyhands.quant import PackedExperts, pack_experts

from .some_resident import SomeResident

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no native kernels: {native.missing()}")
LEVELS = native.levels() if native.available() else []
FORMATS = ("float32", "bf16", "int8", "int4", "q8_0", "q4_0")
E, K, D, F = 4, 2, 40, 24
PATTERNS = list(chain.from_iterable(combinations(range(E), n) for n in range(E + 1)))


@cache
def packed(format: str = "int8", F: int = F) -> PackedExperts:
    g = torch.Generator().manual_seed(0)
    up, down = torch.randn(E, 2 * F, D, generator=g), torch.randn(E, D, F, generator=g)
    biases = torch.randn(E, 2 * F, generator=g), torch.randn(E, D, generator=g)
    return pack_experts(ExpertWeights(up, down, *biases, "swiglu"), format, 32)


@cache
def routed(T: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(T)
    ids = torch.stack([torch.randperm(E, generator=g)[:K] for _ in range(T)])
    kept = torch.rand(T, K, generator=g) > 0.1
    return torch.randn(T, D, generator=g), ids, torch.rand(T, K, generator=g), kept


ONE = (torch.ones(1, D), torch.tensor([[3, 1]]), torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool))
"""A token for experts 1 and 3."""


@pytest.mark.parametrize("T", [1, 7, 64, 300])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("level", LEVELS)
def test_every_pattern_gives_the_same_bits(level: str, format: str, T: int) -> None:
    x, *routing = routed(T)
    code = library.level_code(level)
    for dtype in (torch.float32, torch.bfloat16):
        expected = packed_experts(x.to(dtype), *routing, packed(format), level, 1)
        for i, resident in enumerate(PATTERNS):
            source = SomeResident(packed(format), resident)
            found = fetch.forward(x.to(dtype), *routing, source.experts, 0, code, 1 + i % 2)
            assert torch.equal(found, expected), (resident, dtype)
            waited = [what[2] for what in source.asked if what[0] == "wait"]
            wanted = set(routing[0][routing[2]].tolist())
            assert waited == sorted(wanted - set(resident))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("format", FORMATS)
def test_in_several_groups_and_exactly(format: str, threads: int) -> None:
    """Activations of 600 pairs are more than one group may have; one expert has several blocks, in two groups."""
    wide = packed(format, 5000)
    x, ids, weights, kept = routed(300)
    ids = torch.where(ids == 0, 1, ids)
    for exact in (False, True):
        with exactly(exact):
            expected = packed_experts(x, ids, weights, kept, wide, threads=1)
            for resident in ((), (1,), (0, 2), (3,)):
                source = SomeResident(wide, resident)
                assert torch.equal(fetch.forward(x, ids, weights, kept, source.experts, threads=threads), expected)


def test_who_is_asked_for_what() -> None:
    source = SomeResident(packed(), [1])
    fetch.forward(*ONE, source.experts, layer=7)
    assert source.asked == [("begin", 7, [1, 3]), ("wait", 7, 3)]
    x, ids, weights, _ = ONE
    source.asked.clear()
    assert not fetch.forward(x, ids, weights, torch.zeros(1, 2, dtype=torch.bool), source.experts).any()
    assert not fetch.forward(*(t[:0] for t in ONE), source.experts).numel()
    assert source.asked == [("begin", 0, []), ("begin", 0, [])]


def test_begin_may_fill_the_table() -> None:
    class Eager(SomeResident):
        def begin(self, layer: int, experts: Sequence[int]) -> None:
            super().begin(layer, experts)
            self.keep(experts)

    source = Eager(packed())
    assert torch.equal(fetch.forward(*ONE, source.experts), packed_experts(*ONE, packed()))
    assert source.asked == [("begin", 0, [1, 3])]


@pytest.mark.parametrize("when", ["begin", "wait"])
@pytest.mark.parametrize("error", [OSError("the disk is gone"), KeyboardInterrupt(), SystemExit(3), IndexError("mine")])
def test_what_a_callback_raises_is_raised(error: BaseException, when: str) -> None:
    source = SomeResident(packed(), [1])

    def broken(*_: object) -> None:
        raise error

    setattr(source, when, broken)
    with pytest.raises(type(error)) as raised:
        fetch.forward(*ONE, source.experts)
    assert raised.value is error
    delattr(source, when)  # the class's own
    assert torch.equal(fetch.forward(*ONE, source.experts), packed_experts(*ONE, packed()))
    assert library.caught.error is None


@pytest.mark.parametrize(("given", "said"), [
    (0, "expert 3 of layer 2 was fetched to no record"),
    (None, "expert 3 of layer 2 was fetched to no record"),
    (8, "one not aligned to 64 bytes"),
    (-1, "one not aligned to 64 bytes"),
    ("here", "cannot be converted to pointer"),
])  # fmt: skip
def test_no_record_is_no_crash(given: object, said: str) -> None:
    source = SomeResident(packed(), [1])
    source.wait = lambda layer, expert: given
    with pytest.raises((native.NativeError, TypeError), match=said):
        fetch.forward(*ONE, source.experts, layer=2)
    del source.wait
    assert torch.equal(fetch.forward(*ONE, source.experts), packed_experts(*ONE, packed()))


def test_what_is_wrong_is_refused_before_anybody_is_asked() -> None:
    x, ids, weights, kept = ONE
    source = SomeResident(packed(), [1])
    for wrong in (4, -1, 2**40):
        with pytest.raises(IndexError, match=f"expert {wrong} of 4"):
            fetch.forward(x, torch.tensor([[wrong, 1]]), weights, kept, source.experts)
    for bad in (x.double(), x[:, 1:], x[0]):
        with pytest.raises(ConfigError, match="native kernels: x"):
            fetch.forward(bad, ids, weights, kept, source.experts)
    assert source.asked == []
    source.experts.table[1] += 8
    with pytest.raises(native.NativeError, match="the record of expert 1 is not aligned to 64 bytes"):
        fetch.forward(*ONE, source.experts)
    for table in (torch.zeros(E), torch.zeros(2, E, dtype=torch.int64), torch.zeros(2 * E, dtype=torch.int64)[::2]):
        with pytest.raises(ConfigError, match="table of records"):
            fetch.forward(*ONE, fetch.FetchedExperts(table, packed().layout, source))


def without_fetch(resident: Sequence[int], name: str) -> Tensor:
    """Experts 1 and 3 by a table, where nobody brings any."""
    source = SomeResident(packed(), resident)
    x, ids, weights, kept = ONE
    y = torch.zeros(1, D)
    routing, _alive = views.routing(ids, weights, kept)
    experts = views.table_experts(source.experts.table, packed().layout)
    hidden = torch.zeros(2, 2 * 32)
    first = (byref(experts), None, byref(routing), views.at(x))
    if name == "mh_forward":
        library.call(name, *first, views.at(y), None, 0, views.run(-1, 1))
    else:
        rest = (hidden.data_ptr(), hidden.numel(), views.at(y), byref(CGradients()), views.run(-1, 1))
        library.call(name, *first, views.at(x), *rest)
    return y


@pytest.mark.parametrize("name", ["mh_forward", "mh_backward"])
def test_an_expert_that_is_not_in_memory(name: str) -> None:
    with pytest.raises(native.NativeError, match=f"{name}: a token is routed to expert 3, which is not in memory"):
        without_fetch([0, 1, 2], name)
    y = without_fetch([1, 3], name)
    if name == "mh_forward":
        assert torch.equal(y, packed_experts(*ONE, packed()))


def test_a_fetch_without_callbacks_is_refused() -> None:
    routing, _alive = views.routing(*ONE[1:])
    none = fetch.CFetch()
    step = CStep(10, fetch._places(addressof(none), addressof(routing)), (E, 0), 0.0)
    with pytest.raises(native.NativeError, match="a callback is missing"):
        library.call("mh_steps", (CStep * 1)(step), 1, views.run(-1, 1))


def in_threads(*work: Callable[[], None]) -> None:
    """All at once, and none for ever."""
    failed: list[BaseException] = []

    def guarded(f: Callable[[], None]) -> None:
        try:
            f()
        except BaseException as error:  # for the test's own thread
            failed.append(error)

    threads = [threading.Thread(target=guarded, args=(f,), daemon=True) for f in work]
    for t in threads:
        t.start()
    for t in threads:
        t.join(20)
    assert not any(t.is_alive() for t in threads), "they wait for each other"
    assert not failed, failed


@pytest.mark.parametrize("T", [1, 64])
def test_other_threads_compute_while_one_waits(T: int) -> None:
    """Each `wait` returns only after another thread's call, so that a lock held meanwhile would be for ever."""
    x, *routing = routed(T)
    expected = packed_experts(x, *routing, packed())
    waiting, done = threading.Semaphore(0), threading.Semaphore(0)
    over = threading.Event()

    def meanwhile() -> None:
        waiting.release()
        assert done.acquire(timeout=10)

    def fetching() -> None:
        for _ in range(20):
            assert torch.equal(fetch.forward(x, *routing, SomeResident(packed(), [2], meanwhile).experts), expected)
        over.set()
        waiting.release()

    def other() -> None:
        while waiting.acquire(timeout=10) and not over.is_set():
            assert torch.equal(packed_experts(x, *routing, packed()), expected)
            done.release()

    in_threads(fetching, other)


def test_a_callback_may_call_the_library_and_several_threads_fetch() -> None:
    def work(T: int) -> Callable[[], None]:
        x, *routing = routed(T)
        expected = packed_experts(x, *routing, packed("int4"))
        inner = routed(7), packed_experts(*routed(7), packed())

        def meanwhile() -> None:
            assert torch.equal(packed_experts(*inner[0], packed()), inner[1])

        def run() -> None:
            for i in range(30):
                source = SomeResident(packed("int4"), PATTERNS[i % len(PATTERNS)], meanwhile)
                assert torch.equal(fetch.forward(x, *routing, source.experts, threads=1 + i % 2), expected)

        return run

    in_threads(work(1), work(64), work(300))
