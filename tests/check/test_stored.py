"""Experts on disk in `check`: green as it stands, and a planted fault of the store is found."""

from dataclasses import replace
from typing import cast

import pytest

import manyhands.check.run
from manyhands.check import run_check, stored
from manyhands.check.report import Row
from manyhands.check.stored import BUDGETS, PACKED, stored_rows
from manyhands.checkpoint.budget import Budget
from manyhands.checkpoint.source import Source
from manyhands.checkpoint.stored import open_store
from manyhands.errors import UserError
from manyhands.kernels import BACKENDS, native
from manyhands.store.disk import RecordFile
from manyhands.store.store import Store
from tests.check.configs import BALANCE, MIXTRAL

needs_native = pytest.mark.skipif(not native.available(), reason="no native kernels")
BITS = {"from disk: states", "from disk: logits"}


@pytest.fixture(autouse=True)
def few(monkeypatch) -> None:
    monkeypatch.setattr(stored, "BATCHES", (3,))


def rows() -> list[Row]:
    return [row for found, _ in stored_rows(0, *PACKED[0]) for row in found]


def red(found: list[Row]) -> set[str]:
    return {row.quantity for row in found if not row.ok}


@needs_native
def test_a_record_of_another_expert(monkeypatch) -> None:
    read = Store._read

    def swapped(self, at, expert, slot):
        found = read(self, at, expert, slot)
        found.offset += self.slot_bytes if expert == 0 else 0
        found.order = (found.order[0], found.offset, found.order[2])
        return found

    monkeypatch.setattr(Store, "_read", swapped)
    assert red(rows()) >= BITS


@needs_native
def test_records_that_stay_under_each_others_names(monkeypatch) -> None:
    begin = Store.begin

    def mixed(self, layer, experts):
        begin(self, layer, experts)
        table = self._tables[self._index[layer]]
        there = table.nonzero()[0]
        table[there] = table[there[::-1]]

    monkeypatch.setattr(Store, "begin", mixed)
    found = rows()
    assert red(found) >= BITS
    wrong = {row.situation.case for row in found if not row.ok}
    assert wrong <= {budget.name for budget in BUDGETS if budget.kept}  # LRU may evict all before it is wanted


@needs_native
def test_a_read_that_comes_short(monkeypatch) -> None:
    read = RecordFile.read

    def short(self, view, offset):
        given = read(self, view, offset)
        view[-1024:] = bytes(1024)
        return given

    monkeypatch.setattr(RecordFile, "read", short)
    assert red(rows()) >= BITS


@needs_native
def test_what_is_read_twice(monkeypatch) -> None:
    read = RecordFile.read
    monkeypatch.setattr(RecordFile, "read", lambda self, view, offset: read(self, view, offset) and 2 * len(view))
    assert red(rows()) == {"from disk: bytes read"}


@needs_native
def test_budgets_under_which_nothing_is_read_again(monkeypatch) -> None:
    monkeypatch.setattr(stored, "BUDGETS", (stored.Slots("lfu", stored.E, 2 * stored.E),))
    (row,) = [row for row in rows() if not row.ok]
    assert row.quantity == "from disk: what became of experts"
    assert row.failing == ("read and not kept", "evicted")


def test_without_native_kernels_it_is_refused_and_not_called_checked(monkeypatch) -> None:
    jobs: list[str] = []
    monkeypatch.setattr(manyhands.check.run, "_do", lambda report, todo, *_: jobs.extend(job[0] for job in todo))
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(native, "missing", lambda: "not built")
    report = run_check(MIXTRAL, BALANCE)
    assert "experts on disk" not in jobs
    assert "experts on disk: only the native kernels read them" in report.skipped
    absent = replace(BACKENDS["native"], missing=lambda: "not built")
    monkeypatch.setitem(BACKENDS, "native", absent)
    with pytest.raises(UserError, match="experts on disk need the native kernels, which are not here: not built"):
        open_store(cast(Source, None), cast(Budget, None))
