"""Blocks: none owned twice, free and used are all there are, whatever grows, forks, shrinks and ends."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from manyhands.engine.blocks import Blocks, OutOfBlocks
from manyhands.engine.chain import Chain

NUMBERS = st.integers(0, 30)


def keys(tokens):
    """Of the full blocks of 3."""
    chain = Chain()
    for i in range(len(tokens) // 3):
        chain.follow(tokens[3 * i : 3 * i + 3])
    return chain.keys


class Tables(RuleBasedStateMachine):
    """Tables of one pool; `stored` is what a cache would hold in each block, so that a copy that is missing shows."""

    def __init__(self):
        super().__init__()
        self.blocks = Blocks(7, block_size=3, most_idle=4)
        self.tables, self.expected, self.stored = [], [], {}

    @rule()
    def begin(self):
        self.tables.append(self.blocks.new_table())
        self.expected.append([])

    @rule(which=NUMBERS, added=st.integers(1, 7), tokens=st.integers(0, 1 << 14))
    def grow(self, which, added, tokens):
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
            expected.append(tokens >> len(expected) & 1)  # two tokens only, so that texts agree
            self.stored[table.ids[position // 3], position % 3] = expected[-1]

    @rule(which=NUMBERS)
    def publish(self, which):
        if self.tables:
            i = which % len(self.tables)
            self.tables[i].publish(keys(self.expected[i]), len(self.expected[i]))

    @rule(which=NUMBERS, tokens=st.integers(0, 1 << 14))
    def find(self, which, tokens):
        text = [tokens >> i & 1 for i in range(which % 13)]
        table, found = self.blocks.new_table(), self.blocks.find(keys(text))
        table.adopt(found)
        self.tables.append(table)
        self.expected.append(text[: 3 * len(found)])

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
        idle = set(self.blocks._idle)
        assert idle.isdisjoint(held) and len(idle) <= 4 and idle <= set(self.blocks._key_of)
        free = [*self.blocks._returned, *idle, *range(self.blocks._untouched, 7)]
        assert sorted([*free, *held]) == list(range(7)), "none is lost, and none is there twice"
        assert all(len(set(table.ids)) == len(table.ids) == self.blocks.needed(table.length) for table in self.tables)

    @invariant()
    def every_table_reads_what_was_written_to_it(self):
        for table, expected in zip(self.tables, self.expected, strict=True):
            assert [self.stored[table.ids[p // 3], p % 3] for p in range(table.length)] == expected

    @invariant()
    def a_key_leads_to_its_tokens(self):
        chains = {tuple(keys(text)): text for b in range(1 << 6) for text in [[b >> i & 1 for i in range(6)]]}
        blocks = self.blocks
        assert {block: key for key, block in blocks._block_of.items()} == blocks._key_of
        for (first, second), text in chains.items():
            for key, tokens in ((first, text[:3]), (second, text[3:])):
                for block in blocks.find([key]):
                    assert [self.stored[block, slot] for slot in range(3)] == tokens


TestTables = Tables.TestCase
TestTables.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)


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


def test_the_block_not_used_for_longest_goes_first_and_the_end_of_a_text_before_its_beginning():
    blocks = Blocks(4, block_size=2)
    texts = {"a": [1, 2, 3, 4], "b": [5, 6]}
    chains = {}
    for name, text in texts.items():
        chains[name] = chain = Chain()
        for i in range(0, len(text), 2):
            chain.follow(text[i : i + 2])
        table = blocks.new_table()
        table.grow(len(text))
        table.publish(chain.keys, len(text))
        table.free()
    assert blocks.num_free == 4 and blocks.num_idle == 3
    user = blocks.new_table()
    user.grow(4)
    assert [len(blocks.find(chain.keys)) for chain in chains.values()] == [1, 1], "the end of a"
    user.grow(6)
    assert [len(blocks.find(chain.keys)) for chain in chains.values()] == [0, 1], "all of a"
    user.grow(8)
    assert [len(blocks.find(chain.keys)) for chain in chains.values()] == [0, 0]
    assert blocks.num_free == 0 and blocks.num_idle == 0


def test_a_key_is_of_all_tokens_so_far_of_the_salt_and_of_the_epoch():
    def key(*blocks, **how):
        chain = Chain(**how)
        for block in blocks:
            chain.follow(block)
        return chain.keys[-1]

    texts = [key([1, 2]), key([2, 1]), key([1, 2], [1, 2]), key([3, 4], [1, 2])]
    apart = [key([1, 2], salt="x"), key([1, 2], salt="1"), key([1, 2], epoch=1), key([1, 2], epoch=11, salt="1")]
    assert len({*texts, *apart}) == 8 and key([1, 2]) == texts[0]
    assert key([1, 2], salt="\ud800") != texts[0], "a lone surrogate, which JSON can bring"


def test_a_block_that_is_written_to_again_is_found_by_what_is_in_it_then():
    blocks, old, new = Blocks(9, block_size=3), keys([1, 2, 3, 4, 5, 6]), keys([1, 2, 3, 4, 0, 0])
    table = blocks.new_table()
    table.grow(6)
    table.publish(old, 6)
    table.truncate(4)
    assert blocks.find(old) == table.ids, "as long as nobody writes"
    table.grow(6)
    assert blocks.find(old) == table.ids[:1] and not table.copies
    table.publish(new, 6)
    assert blocks.find(new) == table.ids
    other = blocks.new_table()
    other.adopt(blocks.find(new))
    table.truncate(5)
    table.grow(6)
    assert table.copies == [(other.ids[1], table.ids[1])] and blocks.find(new) == other.ids, "the other's stays"
