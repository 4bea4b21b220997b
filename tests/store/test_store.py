"""Records brought from a file: the same bits as from memory, whatever stays; and what becomes of a broken disk."""

import copy
import gc
import os
import pickle
import shutil
import threading
from pathlib import Path

import pytest
import torch

from manyhands.engine.batch import Batch, Row
from manyhands.engine.caches import Caches
from manyhands.engine.runner import Runner
from manyhands.errors import DiskError, ManyhandsError
from manyhands.kernels import native
from manyhands.store import disk
from manyhands.store.policies import policy

from ..runtime.test_program import CASES, packed_model
from .stored_model import stored_model

needs_native = pytest.mark.skipif(not native.available(), reason=f"no native kernels: {native.missing()}")
E, L = 8, 3
LENGTHS = [1, 7, 1, 1, 20, 1, 1, 1]
COUNTS = [[e * (l + 1) % 5 for e in range(E)] for l in range(L)]


def states_of(runner: Runner) -> torch.Tensor:
    """Of one text, in steps of `LENGTHS`."""
    cache, first, found = Caches(L).new(), 0, []
    for count in LENGTHS:
        ids = [(7 * i) % 50 for i in range(first, first + count)]
        found.append(runner.run(Batch([Row(ids, cache)]), states=True).states)
        first += count
    return torch.cat(found)


def wants_of(runner: Runner) -> list[dict[int, list[int]]]:
    """What each pass wanted of each layer, by the routing of a model in memory, a token at a time."""
    cache, wants = Caches(L).new(), []
    for i in range(30):
        routed = runner.run(Batch([Row([(7 * i) % 50], cache)])).routed.layers
        wants.append({layer: sorted(set(r.expert_ids.flatten().tolist())) for layer, r in routed.items()})
    return wants


@needs_native
@pytest.mark.parametrize("format", ["int8", "int4", "bf16"])
@pytest.mark.parametrize("name", ["lfu", "lru", "pinned"])
def test_the_same_bits_for_every_budget(tmp_path, format, name) -> None:
    model = packed_model(CASES["qwen2"], format)
    expected = states_of(Runner(model, exact=True))
    for num_slots, num_staged, readers, direct in [
        (3, 3, 1, True),
        (4, 3, 4, False),
        (9, 6, 2, True),
        (40, 8, 4, True),
    ]:
        how = {"counts": COUNTS if name == "pinned" else None, "num_readers": readers, "direct": direct}
        other, store = stored_model(model, tmp_path / "records", num_slots, num_staged, name, **how)
        assert torch.equal(states_of(Runner(other, exact=True)), expected), (num_slots, num_staged)
        found = store.take()
        assert found.num_bytes == store.num_bytes == found.misses * store.slot_bytes > 0
        if num_slots == 40 and name != "pinned":
            assert found.misses <= E * L
        store.close()


@needs_native
@pytest.mark.parametrize("name", ["lfu", "lru", "pinned"])
@pytest.mark.parametrize("num_slots", [3, 5, 9, 14, 30])
def test_hits_are_those_of_the_policy_alone(tmp_path, name, num_slots) -> None:
    model = packed_model(CASES["qwen3"], "int8")
    wants = wants_of(Runner(model))
    other, store = stored_model(model, tmp_path / "records", num_slots, 3, name, COUNTS if name == "pinned" else None)
    assert wants_of(Runner(other)) == wants
    alone = policy(name, (num_slots - 3) * store.slot_bytes, [store.slot_bytes] * L, COUNTS)
    hits = misses = 0
    for want in wants:
        for index, experts in enumerate(want.values()):
            decision = alone.want(index, experts)
            hits, misses = hits + len(decision.hits), misses + len(decision.misses)
        alone.end_step()
    found = store.take()
    assert (found.hits, found.misses) == (hits, misses)
    assert store.num_bytes == misses * store.slot_bytes
    assert hits > 0 or num_slots < 14  # below one token's experts there may be none


@needs_native
def test_a_copy_of_a_record_is_what_the_file_says(tmp_path) -> None:
    model = packed_model(CASES["dots"], "int4")
    other, store = stored_model(model, tmp_path / "records", 6, 3)
    states_of(Runner(other))
    for layer, moe in model.sparse_layers().items():
        for e in range(E):
            assert torch.equal(store.record(layer, e), moe.experts.records[e])
        found, right = other.sparse_layers()[layer].experts.stacked([5, 0]), moe.experts.stacked([5, 0])
        assert torch.equal(found.up, right.up) and torch.equal(found.down, right.down)
    ids = torch.tensor([[1, 2, 3, 4]])
    for implementation in ("eager", "grouped_mm"):
        for m in (model, other):
            for moe in m.sparse_layers().values():
                moe.experts.implementation = implementation
        assert torch.equal(other(ids).logits, model(ids).logits)


@needs_native
def test_too_many_tokens_for_the_room_run_in_parts(tmp_path) -> None:
    model = packed_model(CASES["qwen3"], "int8")
    other, store = stored_model(model, tmp_path / "records", 4, 3)
    runner = Runner(other)
    states_of(runner)
    assert store.policy.steps == sum(LENGTHS)
    roomy, store = stored_model(model, tmp_path / "records", 9, 8)
    states_of(Runner(roomy))
    assert store.policy.steps == len(LENGTHS)
    with pytest.raises(ManyhandsError, match="a step wants 4 experts of layer 1, and 3 fit"):
        stored_model(model, tmp_path / "records", 4, 3)[1].begin(1, [0, 1, 2, 3])


@needs_native
@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize(("harm", "said"), [
    (lambda path: os.truncate(path, path.stat().st_size - 5000), "was changed since the model was loaded"),
    (lambda path: path.unlink(), "is gone since the model was loaded"),
    (lambda path: path.write_bytes(path.read_bytes()), "was changed"),
    (lambda path: Path(shutil.copy(path, path.with_name("new"))).rename(path), "was changed"),
])  # fmt: skip
def test_a_file_that_is_not_what_it_was(tmp_path, harm, said, direct) -> None:
    path = tmp_path / "records"
    model = packed_model(CASES["qwen3"], "int8")
    other, _store = stored_model(model, path, 4, 3, direct=direct)
    harm(path)
    with pytest.raises(DiskError, match=said) as raised:
        states_of(Runner(other))
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


@needs_native
def test_after_an_error_the_next_step_is_right(tmp_path, monkeypatch) -> None:
    model = packed_model(CASES["qwen3"], "int8")
    expected = states_of(Runner(model))
    other, _store = stored_model(model, tmp_path / "records", 12, 3)
    runner = Runner(other)
    states_of(runner)
    real, calls = os.preadv, []

    def sometimes(fd, views, offset):
        calls.append(offset)
        if len(calls) % 5 == 0:
            raise OSError(5, "Input/output error")
        return real(fd, views, offset)

    monkeypatch.setattr(disk.os, "preadv", sometimes)
    failed = 0
    for _ in range(30):
        try:
            found = states_of(runner)
        except DiskError as error:
            assert "cannot be read: Input/output error" in str(error)
            failed += 1
        else:
            assert torch.equal(found, expected)
    assert failed > 3
    monkeypatch.undo()
    assert torch.equal(states_of(runner), expected)


@needs_native
def test_a_short_read(tmp_path, monkeypatch) -> None:
    model = packed_model(CASES["qwen3"], "int8")
    other, _store = stored_model(model, tmp_path / "records")
    real = os.preadv
    monkeypatch.setattr(disk.os, "preadv", lambda fd, views, offset: real(fd, [views[0][:512]], offset))
    assert torch.equal(states_of(Runner(other)), states_of(Runner(model)))  # which comes in pieces
    monkeypatch.undo()
    other, _store = stored_model(model, tmp_path / "others")
    monkeypatch.setattr(disk.os, "preadv", lambda fd, views, offset: 0)
    with pytest.raises(DiskError, match=r"ends at byte .*it was cut"):
        states_of(Runner(other))


@needs_native
def test_threads_and_files_end_with_the_model(tmp_path) -> None:
    def readers() -> int:
        return sum(t.name.startswith("manyhands-reader") for t in threading.enumerate())

    def files() -> int:
        return sum(os.readlink(f"/proc/self/fd/{fd}").endswith("records") for fd in os.listdir("/proc/self/fd")
                   if os.path.lexists(f"/proc/self/fd/{fd}"))  # fmt: skip

    gc.collect()
    before, open_before = readers(), files()
    model, store = stored_model(packed_model(CASES["qwen3"], "int8"), tmp_path / "records")
    runner = Runner(model)
    states_of(runner)
    assert (readers(), files()) == (before + 4, open_before + 1)
    del model, store, runner
    gc.collect()
    assert (readers(), files()) == (before, open_before)
    model, store = stored_model(packed_model(CASES["qwen3"], "int8"), tmp_path / "records")
    store.close()
    store.close()
    assert (readers(), files()) == (before, open_before)
    with pytest.raises(DiskError, match="was closed: load it again"):
        states_of(Runner(model))


@needs_native
def test_two_models_and_two_threads_at_once(tmp_path) -> None:
    cases = [packed_model(CASES["qwen3"], "int8"), packed_model(CASES["dots"], "int4")]
    expected = [states_of(Runner(model)) for model in cases]
    others = [stored_model(model, tmp_path / f"{i}", 6, 3)[0] for i, model in enumerate(cases)]
    found: list[bool] = []

    def work(i: int) -> None:
        runner = Runner(others[i])  # two of the threads share a store
        found.extend(torch.equal(states_of(runner), expected[i]) for _ in range(5))

    threads = [threading.Thread(target=work, args=(i % 2,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [True] * 20


@needs_native
def test_copies_share_and_nobody_else_can_have_it(tmp_path) -> None:
    model = packed_model(CASES["qwen3"], "int8")
    other, store = stored_model(model, tmp_path / "records")
    twin = copy.deepcopy(other)
    assert torch.equal(states_of(Runner(twin)), states_of(Runner(model)))
    assert twin.sparse_layers()[0].experts.store is store
    with pytest.raises(TypeError, match="load it where it is needed"):
        pickle.dumps(other)


@needs_native
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_is_told(tmp_path) -> None:
    other, store = stored_model(packed_model(CASES["qwen3"], "int8"), tmp_path / "records")
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            store.begin(0, [1, 2])
        except DiskError as error:
            os.write(write, str(error).encode())
        finally:
            store.close()
            os._exit(0)
    os.close(write)
    assert b"cannot be used in a forked process" in os.read(read, 1000)
    os.waitpid(pid, 0)
    assert torch.isfinite(states_of(Runner(other))).all()


def test_no_such_file(tmp_path) -> None:
    with pytest.raises(DiskError, match="cannot be read: No such file"):
        disk.RecordFile(tmp_path / "none")
