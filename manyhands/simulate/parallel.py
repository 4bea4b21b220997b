"""Expert parallelism on a recorded trace as a whole: from what was asked to all that is printed and written as JSON."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from manyhands.config.parallel import Layout
from manyhands.errors import DataError, UserError
from manyhands.plan.network import Network
from manyhands.plan.parallel import distinct_shards
from manyhands.simulate.exchange import Exchange, Way, exchanged
from manyhands.simulate.tokens import Tokens
from manyhands.trace.counts import expert_counts
from manyhands.trace.foreign import opened
from manyhands.trace.placement import Slots, balanced, contiguous
from manyhands.trace.recording import Manifest, Trace

PLACEMENTS = ("contiguous", "eplb")
_MOST_CELLS = 1 << 22
"""Layers × ranks × ranks of a set: what is counted for each pass."""


@dataclass(frozen=True)
class Settings:
    """What is asked.

    layout      the ranks.
    placement   contiguous (as training does) or eplb.
    redundant   further copies of experts in each layer, for eplb.
    groups      of successive experts that a token's choice is limited to, for eplb.
    node        ranks of a node; None: all are alike.
    sequences   texts that run together; 0: the forward passes that were recorded.
    max_tokens  the first so many of the trace; None: all.
    counted     the trace that eplb counts the load in; None: the same.
    row_bytes   of a token on its way out, and back; None: no times.
    network     between ranks, or between nodes where there are some; None: no times.
    links       within a node; None: as `network`.
    """

    layout: Layout
    placement: str = "contiguous"
    redundant: int = 0
    groups: int = 1
    node: int | None = None
    sequences: int = 0
    max_tokens: int | None = None
    counted: Path | None = None
    row_bytes: tuple[float, float] | None = None
    network: Network | None = None
    links: Network | None = None


@dataclass(frozen=True)
class Report:
    """What came of it."""

    name: str
    manifest: Manifest
    settings: Settings
    recorded_tokens: int
    cut: bool
    """The sequences are pieces of fewer texts."""
    slots: Slots
    exchange: Exchange
    plain: Exchange | None
    """The same with experts contiguous, beside another placement; None where ranks do not divide experts."""

    @property
    def uniform(self) -> float | None:
        """Distinct ranks per token were routing uniform; None with copies, which the formula does not know."""
        return self._uniform(self.settings.layout.ep)

    @property
    def uniform_nodes(self) -> float | None:
        """The same of nodes; None where there is one."""
        s = self.settings
        return self._uniform(s.layout.ep // s.node) if s.node is not None and s.node < s.layout.ep else None

    def _uniform(self, shards: int) -> float | None:
        E, K = self.manifest.num_experts, self.manifest.num_experts_per_tok
        return None if self.settings.redundant or E % shards else distinct_shards(E, K, shards)

    def seconds(self, way: str) -> float | None:
        """Of a pass, all layers: out and back, in turn. `way`: by_pairs, by_tokens, by_nodes; None where not known."""
        s, x = self.settings, self.exchange
        if s.network is None or s.row_bytes is None:
            return None
        if way != "by_nodes":
            return self._through(s.network, x.by_pairs if way == "by_pairs" else x.by_tokens, way)
        if x.network is None or x.links is None:
            return None
        return max(self._through(s.network, x.network, way), self._through(s.links or s.network, x.links, way))

    def _through(self, network: Network, rows: Way, way: str) -> float:
        assert self.settings.row_bytes is not None
        out, back = self.settings.row_bytes
        K, busiest = self.manifest.num_experts_per_tok, rows.waited(network.duplex).sum() / self.exchange.passes
        extra = 0 if way == "by_pairs" else K * PER_CHOICE
        collectives = COLLECTIVES[way] * len(self.manifest.layers)
        return network.seconds(busiest * (out + extra + back), collectives)

    def described(self) -> dict[str, Any]:
        """For JSON."""
        m, s, x = self.manifest, self.settings, self.exchange
        times = {way: self.seconds(way) for way in COLLECTIVES}
        return {
            "trace": self.name,
            "layers": len(m.layers),
            "num_experts": m.num_experts,
            "num_experts_per_tok": m.num_experts_per_tok,
            "recorded_tokens": self.recorded_tokens,
            "tokens": x.tokens,
            "passes": x.passes,
            "passes_with_fewer_tokens_than_ranks": x.short,
            "sequences": s.sequences,
            "pieces_of_the_same_texts": self.cut,
            "layout": {"dp": s.layout.dp, "ep": s.layout.ep, "node": s.node},
            "placement": s.placement,
            "placement_counted_in": None if s.placement == "contiguous" else str(s.counted or "the same trace"),
            "redundant": s.redundant,
            "slots": self.slots.experts_LS.tolist() if s.placement != "contiguous" else None,
            "distinct_ranks_if_uniform": self.uniform,
            "distinct_nodes_if_uniform": self.uniform_nodes,
            "most_nodes": x.most_nodes or None,
            "network": s.network.model_dump() if s.network is not None else None,
            "links": s.links.model_dump() if s.links is not None else None,
            "row_bytes": list(s.row_bytes) if s.row_bytes is not None else None,
            "pass_seconds": {way: seconds for way, seconds in times.items() if seconds is not None} or None,
            "by_layer": [self._layer(i) for i in range(len(m.layers))],
        }

    def _layer(self, i: int) -> dict[str, Any]:
        x, dp, R = self.exchange, self.settings.layout.dp, self.settings.layout.ep
        found: dict[str, Any] = {"layer": self.manifest.layers[i]}
        for name, rows_LWR, way in (("by_pairs", x.pairs_LWR, x.by_pairs), ("by_tokens", x.tokens_LWR, x.by_tokens)):
            rows = rows_LWR[i].reshape(dp, R, R)
            own = np.diagonal(rows, axis1=-2, axis2=-1)
            found[name] = {
                "sent": (rows.sum(-1) - own).ravel().tolist(),
                "received": (rows.sum(-2) - own).ravel().tolist(),
                "remote": int(way.remote_L[i]),
                "busiest": int(way.busiest_L[i]),
                "busiest_both_ways": int(way.both_L[i]),
                "busiest_over_mean": float(x.port_L(way)[i]),
            }
        for name, between in (("network", x.network), ("links", x.links)):
            if between is not None:
                found[name] = {"remote": int(between.remote_L[i]), "busiest": int(between.busiest_L[i])}
        found["distinct_ranks"] = float(x.tokens_LWR[i].sum() / x.tokens)
        if x.network is not None:
            found["distinct_nodes"] = float(x.nodes_L[i] / x.tokens)
        found["load"] = x.load_LWR[i].ravel().tolist()
        found["load_over_mean"] = {"all": float(x.load_L[i]), "by_pass": float(x.waiting_L[i])}
        if self.plain is not None:
            found["contiguous_load_over_mean"] = {
                "all": float(self.plain.load_L[i]),
                "by_pass": float(self.plain.waiting_L[i]),
            }
        return found


COLLECTIVES = {"by_pairs": 3, "by_tokens": 5, "by_nodes": 5}
"""Of a layer's forward pass: how many rows come; rows, by tokens also their choices' weights and numbers; results."""
PER_CHOICE = 12
"""Bytes that go out with a token for each of its K choices: a float32 weight, an int64 number of an expert."""


def laid_out(path: Path, settings: Settings, progress: Callable[[int, int], None] = lambda done, total: None) -> Report:
    """Count what the trace at `path` (ours, or another engine's file) sends on a layout.

    Raises `UserError` for settings that do not fit the trace and `DataError` for one that cannot be read.
    """
    with opened(path) as trace:
        manifest, recorded = trace.manifest, len(trace)
        _check(path, manifest, settings)
        tokens = Tokens.of(trace, settings.max_tokens, kept=True)
        slots = _slots(trace, settings)
    cut = False
    if settings.sequences:
        merged = tokens.merged(settings.sequences)
        tokens, cut = merged.tokens, merged.cut
    layout, L, E = settings.layout, len(manifest.layers), manifest.num_experts
    twice = settings.placement != "contiguous" and E % layout.ep == 0

    def told(first: int) -> Callable[[int, int], None]:
        return lambda done, total: progress(first * total + done, (1 + twice) * total)

    found = exchanged(tokens, slots, layout, settings.node, told(0))
    plain = exchanged(tokens, contiguous(L, E, layout.ep), layout, settings.node, told(1)) if twice else None
    return Report(path.name, manifest, settings, recorded, cut, slots, found, plain)


def _check(path: Path, manifest: Manifest, settings: Settings) -> None:
    layout, L = settings.layout, len(manifest.layers)
    if (cells := L * layout.size * layout.ep) > _MOST_CELLS or L * manifest.num_experts > 1 << 20:
        raise DataError(
            f"{path}: {L:,} layers of {manifest.num_experts:,} experts on {layout}: {cells:,} numbers for each pass; "
            f"a simulation takes {_MOST_CELLS:,}, and {1 << 20:,} experts in all"
        )
    if settings.placement not in PLACEMENTS:
        raise UserError(f"--placement {settings.placement}: expected one of {', '.join(PLACEMENTS)}")
    if settings.placement == "contiguous":
        if settings.redundant:
            raise UserError(f"--redundant {settings.redundant} needs --placement eplb, which says where copies go")
        if manifest.num_experts % layout.ep:
            raise UserError(f"--layout {layout}: {layout.ep} ranks do not divide {manifest.num_experts} experts")
    if settings.redundant > 16 * manifest.num_experts:
        raise UserError(f"--redundant {settings.redundant}: at most 16 for each of the {manifest.num_experts} experts")
    if settings.node is not None and settings.node < layout.ep and layout.ep % settings.node:
        raise UserError(f"--node {settings.node} does not divide the {layout.ep} ranks that share experts in {layout}")


def _slots(trace: Trace, settings: Settings) -> Slots:
    """Where experts lie."""
    m, R = trace.manifest, settings.layout.ep
    if settings.placement == "contiguous":
        return contiguous(len(m.layers), m.num_experts, R)
    if settings.counted is None:
        load = expert_counts(trace)
    else:
        with opened(settings.counted) as other:
            here, there = (m.layers, m.num_experts), (other.manifest.layers, other.manifest.num_experts)
            if here != there:
                raise UserError(
                    f"--pin {settings.counted}: {len(there[0])} layers of {there[1]} experts, "
                    f"{trace.path} has {len(here[0])} of {here[1]}"
                )
            load = expert_counts(other)
    nodes = R // settings.node if settings.node is not None and settings.node < R else 1
    return balanced(load, R, settings.redundant, settings.groups, nodes)
