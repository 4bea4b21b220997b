"""Rows on ranks: against loops over tokens, and what must hold for any routing."""

from collections import Counter

import numpy as np
import pytest

from manyhands.config.parallel import Layout
from manyhands.plan.parallel import distinct_shards
from manyhands.simulate.exchange import dealt, exchanged
from manyhands.simulate.tokens import Tokens
from manyhands.trace.placement import balanced, contiguous
from tests.simulate.small import some_tokens


def by_hand(tokens: Tokens, device_of: list, layout: Layout, node: int) -> dict:
    """Token by token, copy by copy. device_of(layer, expert, turn) is a place in a set."""
    dp, R = layout
    found: dict = {name: Counter() for name in ("pairs", "tokens", "net", "links", "load")}
    busiest: dict = {name: Counter() for name in ("pairs", "tokens", "net", "links", "load")}
    both: dict = {name: Counter() for name in found}
    number = -1
    for step in np.unique(tokens.step):
        ids = tokens.expert_ids[tokens.step == step]
        ranks = [rank for rank, share in enumerate(np.array_split(np.arange(len(ids)), dp * R)) for _ in share]
        first, number = number + 1, number + len(ids)
        for layer in range(ids.shape[1]):
            sent: dict = {name: Counter() for name in found}
            got: dict = {name: Counter() for name in found}
            for turn, (chosen, rank) in enumerate(zip(ids[:, layer], ranks, strict=True), first):
                home, here = divmod(rank, R)
                devices = [device_of(layer, e, turn) for e in chosen if e != tokens.none]
                travels = {
                    "pairs": [(here, d) for d in devices],
                    "tokens": [(here, d) for d in set(devices)],
                    "net": [(here, n * node + here % node) for n in {d // node for d in devices}],
                    "links": [(d // node * node + here % node, d) for d in set(devices)],
                }
                for name, ways in travels.items():
                    for a, b in ways:
                        if name in ("pairs", "tokens"):
                            found[name][layer, rank, b] += 1
                        if a != b:
                            sent[name][home, a] += 1
                            got[name][home, b] += 1
                for d in devices:
                    found["load"][layer, home, d] += 1
                    got["load"][home, d] += 1
            for name in busiest:
                found["remote", name] = found.get(("remote", name), Counter())
                found["remote", name][layer] += sum(sent[name].values())
                busiest[name][layer] += max([*sent[name].values(), *got[name].values()], default=0)
                both[name][layer] += max((sent[name] + got[name]).values(), default=0)
    return {"found": found, "busiest": busiest, "both": both}


@pytest.mark.parametrize("layout", [Layout(1, 4), Layout(2, 4), Layout(3, 2), Layout(1, 1)])
@pytest.mark.parametrize("redundant", [0, 4])
def test_counted_by_loops(layout: Layout, redundant: int) -> None:
    tokens = some_tokens(T=90, L=3, K=3, E=8, prompt=40)
    load = np.random.default_rng(3).random((3, 8))
    slots = balanced(load, layout.ep, redundant) if redundant else contiguous(3, 8, layout.ep)
    share = (8 + redundant) // layout.ep

    def device_of(layer: int, e: int, turn: int) -> int:
        lies = np.flatnonzero(slots.experts_LS[layer] == e) // share
        return int(lies[turn % len(lies)])

    node = max(1, layout.ep // 2)
    found = exchanged(tokens, slots, layout, node)
    expected = by_hand(tokens, device_of, layout, node)
    rows, busiest = expected["found"], expected["busiest"]
    for layer in range(3):
        for rank in range(layout.size):
            for there in range(layout.ep):
                assert found.pairs_LWR[layer, rank, there] == rows["pairs"][layer, rank, there]
                assert found.tokens_LWR[layer, rank, there] == rows["tokens"][layer, rank, there]
        for home in range(layout.dp):
            for there in range(layout.ep):
                assert found.load_LWR[layer, home, there] == rows["load"][layer, home, there]
        ways = {"pairs": found.by_pairs, "tokens": found.by_tokens, "net": found.network, "links": found.links}
        for name, way in ways.items():
            if way is not None:
                assert way.remote_L[layer] == rows["remote", name][layer], name
                assert way.busiest_L[layer] == busiest[name][layer], name
                assert way.both_L[layer] == expected["both"][name][layer], name
        assert found.waited_L[layer] == busiest["load"][layer]
    assert (found.network is None) == (layout.ep == 1)


def test_one_rank_sends_nothing() -> None:
    found = exchanged(some_tokens(), contiguous(3, 8, 1), Layout(1, 1))
    assert found.by_pairs.remote_L.sum() == found.by_tokens.remote_L.sum() == 0
    assert found.load_L.tolist() == found.port_L(found.by_pairs).tolist() == [1.0] * 3


def test_uniform_routing_is_the_formula() -> None:
    """Of 20,000 uniform draws; the mean of a number from 1 to 4 is within 4 σ/√n ≤ 0.03 of what is expected."""
    rng = np.random.default_rng(5)
    ids = np.argsort(rng.random((20_000, 1, 16)), axis=-1)[..., :4].astype(np.uint8)
    zeros = np.zeros(20_000, np.int32)
    found = exchanged(Tokens(ids, zeros, zeros, zeros > 0, 255), contiguous(1, 16, 4), Layout(1, 4))
    assert found.tokens_LWR.sum() / 20_000 == pytest.approx(distinct_shards(16, 4, 4), abs=0.03)
    assert found.by_pairs.remote_L[0] / 20_000 == pytest.approx(4 * 3 / 4, abs=0.05)


def test_node_limited_routing_reaches_few_nodes() -> None:
    """Each token's 4 experts from 2 of 8 groups; a node for each: never more than 2 nodes."""
    rng = np.random.default_rng(6)
    groups = np.argsort(rng.random((500, 8)), axis=-1)[:, :2]
    inside = np.stack([np.argsort(rng.random((500, 4)), axis=-1)[:, :2] for _ in range(2)], axis=1)
    ids = (groups[..., None] * 4 + inside).reshape(500, 1, 4).astype(np.uint8)
    zeros = np.zeros(500, np.int32)
    tokens = Tokens(ids, zeros, zeros, zeros > 0, 255)
    found = exchanged(tokens, contiguous(1, 32, 16), Layout(1, 16), per_node=2)
    assert found.most_nodes == 2 and found.nodes_L[0] == 2 * 500
    load = np.bincount(ids.ravel(), minlength=32)[None]
    placed = balanced(load, 16, groups=8, nodes=8)
    assert exchanged(tokens, placed, Layout(1, 16), per_node=2).most_nodes == 2
    assert exchanged(tokens, balanced(load, 16), Layout(1, 16), per_node=2).most_nodes > 2


def test_tokens_are_dealt_as_a_batch_is() -> None:
    assert dealt(8, 4).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert dealt(3, 4).tolist() == [0, 1, 2] and dealt(6, 4).tolist() == [0, 0, 1, 1, 2, 3]
