"""Two made-up tasks. One needs memory alone: random facts. One needs computing alone: where a walk in a graph ends.

N facts, B sequences, S tokens each, G corners of the graph.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations

import torch
from torch import Tensor

from manyhands.lab.learn import Asked

SYMBOLS, KEY, VALUE = 64, 3, 4
"""A fact is a key of 3 symbols and a value of 4, each of 64; in front of it stands one symbol more."""
CORNERS = 6


@dataclass(frozen=True, slots=True)
class Facts:
    """`count` keys, all different, and their values, drawn with `seed`: nothing about a value follows from its key."""

    count: int
    seed: int

    @property
    def bits(self) -> float:
        """What there is to be remembered, the values: 24 bits per fact."""
        return self.count * VALUE * math.log2(SYMBOLS)

    def all(self) -> Asked:
        """Every fact once: the value's symbols are asked for, each with what is before it given."""
        draw = torch.Generator().manual_seed(self.seed)
        number_N = torch.randperm(SYMBOLS**KEY, generator=draw)[: self.count]
        keys = [number_N // SYMBOLS**place % SYMBOLS for place in range(KEY)]
        value = torch.randint(0, SYMBOLS, (self.count, VALUE), generator=draw)
        facts = torch.cat([torch.full((self.count, 1), SYMBOLS), torch.stack(keys, 1), value], 1)
        mask = torch.zeros(self.count, KEY + VALUE, dtype=torch.bool)
        mask[:, KEY:] = True
        return Asked(facts[:, :-1], facts[:, 1:], mask)

    def batches(self, size: int, seed: int) -> Iterator[Asked]:
        """All of them again and again, in a new order each time; a last batch that is not full is left out."""
        facts, order = self.all(), torch.Generator().manual_seed(seed)
        while True:
            shuffled = torch.randperm(self.count, generator=order)
            for rows in torch.split(shuffled, size):
                if len(rows) == size:
                    yield Asked(facts.ids[rows], facts.targets[rows], facts.mask[rows])


def walk_table() -> Tensor:
    """[G, G]: the corner where the edge called j leads from corner i, in the graph of the permutations of three things.

    The order of the steps matters (the group S₃ is not commutative), so a walk cannot be counted, only followed.
    """
    orders = list(permutations(range(3)))
    number = {order: i for i, order in enumerate(orders)}
    return torch.tensor([[number[tuple(a[i] for i in b)] for b in orders] for a in orders])


def walks(size: int, length: int, seed: int) -> Iterator[Asked]:
    """Random walks of `length` edges, never the same ones again: after each edge it is asked where the walk is now.

    All begin at corner 0, and with a symbol that says so: without it, a model with rotary positions cannot tell an edge
    taken once from the same edge taken twice.
    """
    draw, table = torch.Generator().manual_seed(seed), walk_table()
    start = torch.full((size, 1), CORNERS)
    mask = torch.ones(size, length + 1, dtype=torch.bool)
    mask[:, 0] = False
    while True:
        edges = torch.randint(0, CORNERS, (size, length), generator=draw)
        at = [torch.zeros(size, dtype=torch.int64)]
        for step in range(length):
            at.append(table[at[-1], edges[:, step]])
        yield Asked(torch.cat([start, edges], 1), torch.stack(at, 1), mask)
