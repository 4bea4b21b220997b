"""The made-up tasks ask what they say."""

from itertools import islice

import torch

from manyhands.lab.made_up import CORNERS, KEY, SYMBOLS, VALUE, Facts, walk_table, walks


def test_every_fact_has_a_key_of_its_own_and_only_its_value_is_asked() -> None:
    facts = Facts(500, seed=3)
    asked = facts.all()
    keys = asked.ids[:, 1 : 1 + KEY]
    assert len(torch.unique(keys, dim=0)) == 500
    assert asked.mask.sum(1).tolist() == [VALUE] * 500
    assert torch.equal(asked.targets[:, :-1], asked.ids[:, 1:])
    assert int(asked.ids.max()) == SYMBOLS and int(asked.targets.max()) < SYMBOLS
    assert facts.bits == 500 * 24
    assert torch.equal(facts.all().targets, asked.targets)


def test_an_epoch_asks_no_fact_twice_and_epochs_differ() -> None:
    facts = Facts(100, seed=0)
    first, second = (torch.cat([b.ids for b in islice(facts.batches(30, seed=each), 3)]) for each in (1, 2))
    assert len(torch.unique(first, dim=0)) == 90
    assert not torch.equal(first, second)


def test_walks_follow_the_edges_of_a_group_that_does_not_commute() -> None:
    table = walk_table()
    everything = torch.arange(CORNERS)
    assert torch.equal(table[0], everything) and torch.equal(table[:, 0], everything)
    assert all(sorted(row) == everything.tolist() for row in table.tolist())
    assert torch.equal(table[table[:, :, None], everything], table[everything[:, None, None], table[None]])
    assert not torch.equal(table, table.t())
    asked = next(walks(16, 5, seed=0))
    assert asked.ids[:, 0].tolist() == [CORNERS] * 16 and not asked.mask[:, 0].any() and asked.mask[:, 1:].all()
    for edges, corners in zip(asked.ids[:, 1:].tolist(), asked.targets[:, 1:].tolist(), strict=True):
        at = 0
        for edge, corner in zip(edges, corners, strict=True):
            at = int(table[at, edge])
            assert at == corner
