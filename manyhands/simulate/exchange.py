"""What expert parallelism sends for the forward passes of a trace: rows counted, rank by rank.

A pass's tokens are dealt to the ranks as a batch is: successive ones, equally many. From there each row goes to the
rank that holds its expert, in one of three ways:

    by_pairs    a token once for each of its experts (`parallel.dispatch: by_pairs`)
    by_tokens   a token once for each rank that holds some of its experts (`by_tokens`; DeepEP's low-latency way)
    by_nodes    a token once for each node, over the network, and from there over the node's links (DeepEP's other way)

T tokens   L layers with experts   K experts per token   W = dp·ep ranks   R = ep ranks of a set   N nodes of a set
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from manyhands.config.parallel import Layout
from manyhands.simulate.tokens import Tokens
from manyhands.trace.placement import Slots

Ints = npt.NDArray[np.int64]


def dealt(tokens: int, ranks: int) -> Ints:
    """[T] the rank that each token of a pass is on: W slices that differ by one token at most."""
    share, more = divmod(tokens, ranks)
    return np.repeat(np.arange(ranks), [share + (rank < more) for rank in range(ranks)])


def splits(device_TLK: Ints, rank_T: Ints, layout: Layout) -> tuple[Ints, Ints]:
    """[L, W, R] rows that each rank gives to each rank of its set, itself included: by pairs, and by tokens.

    device_TLK is the place in a set, 0 to R - 1, that computes each pair; R for none. Row w of a layer is the list of
    sizes that rank w's all-to-all is called with.
    """
    L = device_TLK.shape[1]
    W, R = layout.size, layout.ep
    cell_TL1 = ((np.arange(L) * W + rank_T[:, None]) * (R + 1))[..., None]
    first_TLK = np.sort(device_TLK, axis=-1)
    new_TLK = np.diff(first_TLK, axis=-1, prepend=-1) != 0

    def counted(cells: Ints) -> Ints:
        return np.bincount(cells, minlength=L * W * (R + 1)).reshape(L, W, R + 1)[..., :R]

    return counted((cell_TL1 + device_TLK).ravel()), counted((cell_TL1 + first_TLK)[new_TLK])


def busiest_port(rows_LGRR: Ints) -> tuple[Ints, Ints]:
    """[L] of rows between the R members of each of G sets, the most that one of them sends to or gets from others, and
    the most that one of them sends and gets.
    """
    own_LGR = np.diagonal(rows_LGRR, axis1=-2, axis2=-1)
    sent_LGR, got_LGR = rows_LGRR.sum(-1) - own_LGR, rows_LGRR.sum(-2) - own_LGR
    return np.maximum(sent_LGR, got_LGR).max((1, 2)), (sent_LGR + got_LGR).max((1, 2))


@dataclass
class Way:
    """Rows of one way to exchange, summed over passes, in one direction; back go as many."""

    remote_L: Ints
    """That leave their rank (or node)."""
    busiest_L: Ints
    """Of the busiest rank in each pass, in its busier direction: what the pass waits for."""
    both_L: Ints
    """Of the busiest rank in each pass, sent and got together."""

    @classmethod
    def of(cls, layers: int) -> "Way":
        """Before the first pass."""
        return cls(*(np.zeros(layers, np.int64) for _ in range(3)))

    def add(self, rows_LGRR: Ints) -> None:
        """A pass's rows between the R members of each of G sets."""
        own_L = np.trace(rows_LGRR, axis1=-2, axis2=-1).sum(1)
        self.remote_L += rows_LGRR.sum((1, 2, 3)) - own_L
        one_way_L, both_L = busiest_port(rows_LGRR)
        self.busiest_L += one_way_L
        self.both_L += both_L

    def waited(self, duplex: bool) -> npt.NDArray[np.float64]:
        """[L] rows of the busiest rank: of its busier direction, or the mean of both (`Network.duplex`)."""
        return self.busiest_L.astype(np.float64) if duplex else self.both_L / 2


@dataclass
class Exchange:
    """All passes of a trace on a layout."""

    layout: Layout
    passes: int
    tokens: int
    short: int
    """Passes with fewer tokens than ranks."""
    pairs_LWR: Ints
    """Rows from each rank to each of its set, itself included, by pairs."""
    tokens_LWR: Ints
    """The same by tokens."""
    by_pairs: Way
    by_tokens: Way
    network: Way | None
    """By nodes, between them; None where a set has one node."""
    links: Way | None
    """By nodes, within them."""
    load_LWR: Ints
    """[L, dp, R] pairs that each rank computes."""
    waited_L: Ints
    """Pairs of the busiest rank in each pass."""
    nodes_L: Ints
    """Distinct nodes that each token's experts lie in, its own among them if so; 0 without nodes."""
    most_nodes: int

    @property
    def load_L(self) -> npt.NDArray[np.float64]:
        """[L] busiest over mean rank, of all passes together: what placement can mend."""
        load = self.load_LWR.reshape(len(self.load_LWR), -1)
        return _ratio(load.max(1), load.mean(1))

    @property
    def waiting_L(self) -> npt.NDArray[np.float64]:
        """[L] busiest over mean rank, pass by pass, by time: what is waited for."""
        return _ratio(self.waited_L, self.load_LWR.reshape(len(self.load_LWR), -1).mean(1))

    def port_L(self, way: Way, duplex: bool = True) -> npt.NDArray[np.float64]:
        """[L] rows of the busiest rank over those of the mean one, pass by pass."""
        return _ratio(way.waited(duplex), way.remote_L / self.layout.size)


def exchanged(
    tokens: Tokens,
    slots: Slots,
    layout: Layout,
    per_node: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Exchange:
    """Count every pass of `tokens`. `per_node` successive ranks are a node; it divides R, or R lies within one."""
    T, L, _ = tokens.expert_ids.shape
    dp, R, W = layout.dp, layout.ep, layout.size
    nodes = R // per_node if per_node is not None and per_node < R else 1
    ends = [*(np.flatnonzero(np.diff(tokens.step)) + 1).tolist(), T]
    found = Exchange(
        layout,
        len(ends),
        T,
        0,
        np.zeros((L, W, R), np.int64),
        np.zeros((L, W, R), np.int64),
        Way.of(L),
        Way.of(L),
        Way.of(L) if nodes > 1 else None,
        Way.of(L) if nodes > 1 else None,
        np.zeros((L, dp, R), np.int64),
        np.zeros(L, np.int64),
        np.zeros(L, np.int64),
        0,
    )
    first = 0
    for done, end in enumerate(ends, 1):
        ids_TLK = tokens.expert_ids[first:end]
        device_TLK = slots.device_of(ids_TLK, np.arange(first, end), tokens.none)
        rank_T = dealt(end - first, W)
        pairs_LWR, tokens_LWR = splits(device_TLK, rank_T, layout)
        found.short += end - first < W
        found.pairs_LWR += pairs_LWR
        found.tokens_LWR += tokens_LWR
        found.by_pairs.add(pairs_LWR.reshape(L, dp, R, R))
        found.by_tokens.add(tokens_LWR.reshape(L, dp, R, R))
        load_LWR = pairs_LWR.reshape(L, dp, R, R).sum(2)
        found.load_LWR += load_LWR
        found.waited_L += load_LWR.reshape(L, -1).max(1)
        if found.network is not None and found.links is not None:
            _between_nodes(found, found.network, found.links, device_TLK, rank_T, tokens_LWR, nodes)
        first = end
        progress(done, len(ends))
    return found


def _between_nodes(
    found: Exchange, network: Way, links: Way, device_TLK: Ints, rank_T: Ints, tokens_LWR: Ints, nodes: int
) -> None:
    """A row crosses the network to the rank of its sender's place in each node, and is passed on there."""
    L, dp, R = len(tokens_LWR), found.layout.dp, found.layout.ep
    places = R // nodes
    node_TLK = device_TLK // places  # `nodes` for no expert
    _, rows = splits(node_TLK, rank_T, Layout(found.layout.size // nodes, nodes))
    between = rows.reshape(L, dp, nodes, places, nodes).swapaxes(2, 3)
    network.add(between.reshape(L, dp * places, nodes, nodes))
    within = tokens_LWR.reshape(L, dp, nodes, places, nodes, places).sum(2)  # [L, dp, place, node, place there]
    links.add(within.swapaxes(2, 3).reshape(L, dp * nodes, places, places))
    found.nodes_L += rows.sum((1, 2))
    ordered = np.sort(node_TLK, axis=-1)
    distinct_TL = ((np.diff(ordered, axis=-1, prepend=-1) != 0) & (ordered != nodes)).sum(-1)
    found.most_nodes = max(found.most_nodes, int(distinct_TL.max(initial=0)))


def _ratio(most: npt.NDArray[Any], mean: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """1 where nothing came."""
    found: npt.NDArray[np.float64] = np.divide(most, mean, out=np.ones(len(most)), where=np.asarray(mean) > 0)
    return found
