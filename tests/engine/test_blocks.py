"""Blocks: none owned twice, free and used are all there are, whatever grows, forks, shrinks and ends."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from manyhands.engine.blocks import Blocks, OutOfBlocks

NUMBERS = st.integers(0, 30)


class Tables(RuleBasedStateMachine):
    """Tables of one pool; `text` is what a cache would hold in each block, so that a copy that is missing shows."""

    def __init__(self):
        super().__init__()
        self.blocks = Blocks(7, block_size=3)
        self.tables, self.expected, self.stored = [], [], {}
        self.next = 0

    @rule()
    def begin(self):
        self.tables.append(self.blocks.new_table())
        self.expected.append([])

    @rule(which=NUMBERS, added=st.integers(1, 7))
    def grow(self, which, added):
        if not self.tables:
            return
        i = which % len(self.tables)
        table, expected = self.tables[i], self.expected[i]
        before = (list(table.ids), table.length, self.blocks.num_free)
        missing = table.missing(table.length + added)
        if missing > self.blocks.num_free:
            with pytest.raises(OutOfBlocks, match=f"{missing} blocks are needed and {self.blocks.num_free} are free"):
                table.grow(table.length + added)
            assert before == (table.ids, table.length, self.blocks.num_free)
            return
        table.grow(table.length + added)
        assert self.blocks.num_free == before[2] - missing
        for source, to in table.copies:
            for slot in range(3):
                self.stored[to, slot] = self.stored.get((source, slot))
        table.copies.clear()
        for position in range(len(expected), table.length):
            self.next += 1
            expected.append(self.next)
            self.stored[table.ids[position // 3], position % 3] = self.next

    @rule(which=NUMBERS)
    def fork(self, which):
        if self.tables:
            i = which % len(self.tables)
            self.tables.append(self.tables[i].fork())
            self.expected.append(list(self.expected[i]))

    @rule(which=NUMBERS, length=st.integers(0, 12))
    def truncate(self, which, length):
        if self.tables:
            i = which % len(self.tables)
            self.tables[i].truncate(length)
            self.expected[i] = self.expected[i][:length]

    @rule(which=NUMBERS)
    def end(self, which):
        if self.tables:
            i = which % len(self.tables)
            self.tables.pop(i).free()
            self.expected.pop(i)

    @invariant()
    def every_block_is_free_or_held(self):
        held = Counter(block for table in self.tables for block in table.ids)
        assert self.blocks.num_used == len(held) and self.blocks.num_free + len(held) == 7
        assert all(self.blocks.holders(block) == count for block, count in held.items())
        assert all(len(set(table.ids)) == len(table.ids) == self.blocks.needed(table.length) for table in self.tables)

    @invariant()
    def every_table_reads_what_was_written_to_it(self):
        for table, expected in zip(self.tables, self.expected, strict=True):
            assert [self.stored[table.ids[p // 3], p % 3] for p in range(table.length)] == expected


TestTables = Tables.TestCase
TestTables.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_a_fork_shares_until_one_of_them_writes():
    blocks = Blocks(4, block_size=2)
    table = blocks.new_table()
    table.grow(3)
    twin = table.fork()
    assert (twin.ids, blocks.num_used) == (table.ids, 2)
    assert twin.missing(4) == 1, "a copy of the shared block, though it has room"
    twin.grow(4)
    assert twin.copies == [(table.ids[1], twin.ids[1])] and twin.ids[0] == table.ids[0] != twin.ids[1]
    assert table.missing(4) == 0, "nobody else holds its last block any more"
    table.free()
    twin.free()
    assert blocks.num_free == 4


def test_blocks_that_were_given_back_are_used_before_new_ones():
    blocks = Blocks(1000)
    for _ in range(5):
        table = blocks.new_table()
        table.grow(64)
        assert sorted(table.ids) == [0, 1]
        table.free()
